"""Requests and tokens a second, time to the first token and between tokens, of several servers side by side.

    python perf/bench_serving.py                                  this repository's server and `transformers serve`, with nano
    python perf/bench_serving.py --servers transformers vllm --concurrency 1 8 64 --new-tokens 128
    python perf/bench_serving.py --servers transformers llama.cpp --gguf nano-gguf/nano-Q8_0.gguf
    python perf/bench_serving.py --servers mine=http://127.0.0.1:8000/v1 --model NAME

What is special:
- Servers are started here and take turns at each concurrency, so that what else the machine does counts against all of them;
  one that runs already is measured by its address. Only loopback is ever asked.
- Every request shows another picture, so that no server answers from what it remembers, and is written to the same length: the
  tokens that would end it are forbidden by `logit_bias`.
- At each concurrency as many clients stream one request after the other. The clients share the machine with the server.
- `transformers serve` has help (see transformers_serve.py): unmodified, it does not load a model with code of its own.
"""

import argparse
import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import median, quantiles
from threading import Thread
from urllib.parse import urlsplit

from minicpmv.drawn.samples import bench_sample


FOLDER = Path(__file__).resolve().parent
NANO = FOLDER.parent / "nano"
START_SECONDS, REQUEST_SECONDS = 900, 300
SERVERS = ("transformers", "llama.cpp", "vllm", "rival")
PACKAGES = ("minicpmv", "torch", "transformers", "vllm", "xllamacpp", "uvicorn")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Load:
    """What `concurrency` clients of a server saw."""

    server: str
    concurrency: int
    requests_per_second: float
    tokens_per_second: float
    first_token_ms: float  # median
    first_token_p95_ms: float
    between_tokens_ms: float  # median of the requests' means
    failed: int

    def __str__(self) -> str:
        return (
            f"{self.server:14}{self.concurrency:4}{self.requests_per_second:12.2f}{self.tokens_per_second:11.1f}"
            f"{self.first_token_ms:15.0f}{self.first_token_p95_ms:9.0f}{self.between_tokens_ms:17.1f}{self.failed:9}"
        )


HEADING = (
    f"{'server':14}{'at':>4}{'requests/s':>12}{'tokens/s':>11}{'first token ms':>15}{'p95':>9}{'between tokens ms':>17}"
    f"{'failed':>9}"
)


@dataclass(frozen=True)
class Streamed:
    """One request: seconds until its tokens came, and how many they were."""

    begun: float
    first: float
    last: float
    tokens: int


# ---- servers ----


@contextmanager
def running(kind: str, model: str, gguf: str | None, vllm_python: str) -> Iterator[tuple[str, str]]:
    """`(address of the API, name of the model)` of a server that ends with the block."""
    if "=" in kind:
        yield kind.partition("=")[2], model
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if kind == "rival":
        name = str(Path(model).resolve())
        command = [str(FOLDER / "transformers_serve.py"), model, "--host", "127.0.0.1", "--port", str(port)]
    else:
        name = "measured"
        what = gguf if kind == "llama.cpp" else model
        command = ["-m", "minicpmv", "serve", "-m", what, "--engine", kind, "--port", str(port), "--served-name", name]
    python = vllm_python if kind == "vllm" else sys.executable
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen([python, *command], stdout=nowhere, stderr=nowhere)
    try:
        until = time.monotonic() + START_SECONDS
        while not is_up(port):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{kind} does not start; try it by itself: python {' '.join(command)}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", name
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


# ---- requests ----


def bodies(name: str, new_tokens: int, ends: Sequence[int]) -> Iterator[bytes]:
    """Requests without end, each with a picture of its own."""
    for index in count():
        sample = bench_sample("form_value", "train", seed=99, index=index)
        file = BytesIO()
        sample.images[0].save(file, "PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": sample.turns[0].question},
        ]
        yield json.dumps(
            {
                "model": name,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": new_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "logit_bias": {str(token): -100.0 for token in ends},
            }
        ).encode()


def stream(address: str, body: bytes) -> Streamed:
    """Ask, and note when tokens come.

    Raises:
        OSError, ValueError: there is no answer, or not a whole one.
    """
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=REQUEST_SECONDS)
    try:
        begun = time.perf_counter()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
        connection.request("POST", f"{parts.path}/chat/completions", body, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {answer.read()[:300]!r}")
        first = last = tokens = pieces = 0
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(str(chunk["error"])[:300])
            tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
            # `transformers serve` takes this model's answers for thoughts.
            deltas = [choice["delta"] for choice in chunk.get("choices") or ()]
            if any(delta.get("content") or delta.get("reasoning_content") for delta in deltas):
                last = time.perf_counter()
                first, pieces = first or last, pieces + 1
        if not pieces:
            raise ValueError("no token came")
        return Streamed(begun, first, last, tokens or pieces)
    finally:
        connection.close()


def load(server: str, address: str, prepared: Sequence[bytes], concurrency: int) -> Load:
    """Let `concurrency` clients send the requests."""
    todo: SimpleQueue[bytes] = SimpleQueue()
    for body in prepared:
        todo.put(body)
    done: list[Streamed] = []
    failures: list[str] = []

    def client() -> None:
        while True:
            try:
                done.append(stream(address, todo.get_nowait()))
            except Empty:
                return
            except (OSError, ValueError, http.client.HTTPException) as error:
                failures.append(str(error))

    begun = time.perf_counter()
    clients = [Thread(target=client) for _ in range(concurrency)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds = time.perf_counter() - begun
    if not done:
        raise SystemExit(f"{server} answers no request: {failures[0]}")
    waits = [1000 * (request.first - request.begun) for request in done]
    gaps = [1000 * (request.last - request.first) / (request.tokens - 1) for request in done if request.tokens > 1]
    return Load(
        server,
        concurrency,
        len(done) / seconds,
        sum(request.tokens for request in done) / seconds,
        median(waits),
        quantiles(waits, n=20, method="inclusive")[-1] if len(waits) > 1 else waits[0],
        median(gaps) if gaps else 0.0,
        len(failures),
    )


def end_tokens(model: str) -> list[int]:
    """The tokens that end an answer, by the model's folder; none where there is no such folder."""
    file = Path(model) / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8"))["eos_token_id"] if file.is_file() else []
    return found if isinstance(found, list) else [found]


def versions(python: str) -> dict[str, str]:
    """What is installed where the servers of a Python run."""
    code = (
        "import json; from importlib.metadata import distributions; "
        "print(json.dumps({each.name: each.version for each in distributions()}))"
    )
    run = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(run.stdout)
    return {name: found[name] for name in PACKAGES if name in found}


def main(arguments: Sequence[str] | None = None) -> list[Load]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--servers", nargs="+", default=["transformers", "rival"], help=f"{', '.join(SERVERS)}, or NAME=URL"
    )
    parser.add_argument("--model", default=str(NANO))
    parser.add_argument("--gguf", help="what llama.cpp serves")
    parser.add_argument(
        "--vllm-python", default=sys.executable, help="of the environment with vLLM, which has other pins"
    )
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--rounds", type=int, default=2, help="requests of each client, on average; four at least in all"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    for kind in options.servers:
        if "=" in kind and urlsplit(kind.partition("=")[2]).hostname not in LOOPBACK:
            parser.error(f"{kind} is not on this machine: load is for servers of your own")
        if "=" not in kind and kind not in SERVERS:
            parser.error(f"{kind} is none of {', '.join(SERVERS)}, nor NAME=URL")
        if kind == "llama.cpp" and not options.gguf:
            parser.error("llama.cpp serves a GGUF file: name it with --gguf")
    found = {"here": versions(sys.executable)}
    if "vllm" in options.servers:
        found["vllm"] = versions(options.vllm_python)
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores; {found}")
    print(HEADING)
    measured = []
    with ExitStack() as started:
        asked = []
        for kind in options.servers:
            address, name = started.enter_context(running(kind, options.model, options.gguf, options.vllm_python))
            requests = bodies(name, options.new_tokens, end_tokens(options.model))  # all servers are asked the same
            stream(address, next(requests))  # what only the first request pays
            asked.append((kind.partition("=")[0], address, requests))
        for concurrency in options.concurrency:
            for server, address, requests in asked:
                prepared = [next(requests) for _ in range(max(4, options.rounds * concurrency))]
                measured.append(load(server, address, prepared, concurrency))
                print(measured[-1], flush=True)
    if options.json:
        content = {
            "versions": found,
            "new_tokens": options.new_tokens,
            "loads": [asdict(one) for one in measured],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return measured


if __name__ == "__main__":
    main()
