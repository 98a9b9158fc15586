"""The same random weights in everything that runs them here: first token, decoding, memory, beside the read rate of the machine.

    python perf/bench_runtimes.py                              0.5 billion parameters, all roads that are installed
    python perf/bench_runtimes.py --size 8b --roads gguf       roads by the beginning of their names
    python perf/bench_runtimes.py --size nano --new-tokens 8   does every road still run?

What is special:
- Each road is a process of its own, so its peak memory is its own; it includes Python and what the road imports.
- Decoding reads all weights of the language model for each token. So a road's limit is the read rate, measured right before
  it by a sum and by a product of a matrix and a vector, over the bytes of its weights as they lie in memory.
- "llama.cpp, stock" is the server inside xllamacpp as it comes, with its own loop, on the same files: the rival.
- Every call gets a prompt of its own, so that nothing is remembered; a prompt is as many tokens without images.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_chat import SMALL, SMALL_TOWER
from random_weights import bytes_read
from transformers import CompileConfig, StaticCache, StoppingCriteria

from minicpmv.checkpoint import load
from minicpmv.deploy.source import SMALL_FILES


REPOSITORY = Path(__file__).resolve().parents[1]
MEDIUM = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "max_window_layers": 28}
MEDIUM |= {"num_attention_heads": 16, "num_key_value_heads": 8}
SIZES: dict[str, dict[str, Any]] = {  # what differs from the published configuration; nano is taken as it is
    "nano": {},
    "0.5b": SMALL | {"vision_config": SMALL_TOWER},
    "2b": MEDIUM,
    "8b": {},
}
WARM_UP = 4  # of the new tokens
ROOM = 1.3  # times the weights: what a road needs of the memory that is free


@dataclass(frozen=True)
class Road:
    """Software and a type of weights.

    `measure(folder, options)` runs in the road's own process, on what `export` (words of `minicpmv export`) wrote, or on
    the checkpoint.
    """

    package: str
    bytes_per_weight: float
    measure: Callable[[Path, argparse.Namespace], dict[str, float]]
    export: tuple[str, str] | None = None  # (target, type)


@dataclass(frozen=True)
class Figures:
    """What a road was measured to do."""

    road: str
    first_token_ms: float
    tokens_per_second: float
    weights_gb: float  # that are read for each token
    bandwidth: float  # GB/s, read by this machine right before
    peak_gib: float

    @property
    def share(self) -> float:
        """Of the read rate."""
        return self.tokens_per_second * self.weights_gb / self.bandwidth


# ---- in the road's own process ----


class Clock(StoppingCriteria):
    """The times at which new tokens were there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def prompt(place: int, tokens: int) -> torch.Tensor:
    """Ids [1, tokens] of plain words, others for each place."""
    return torch.randint(10, 250, (1, tokens), generator=torch.Generator().manual_seed(place))


def generating(model: Any, weights: int, options: argparse.Namespace, **more: Any) -> dict[str, float]:
    """Times of `generate`, the first call left out."""
    new, firsts, rates = options.new_tokens, [], []
    # All new tokens are written so, without a processor that takes time at each of them.
    model.generation_config.eos_token_id = None
    for place in range(1 + options.repeats):
        if "past_key_values" in more:
            more["past_key_values"].reset()
        ids, clock = prompt(place, options.prompt_tokens), Clock()
        start = time.perf_counter()
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
        model.generate(**asked, max_new_tokens=new, stopping_criteria=[clock], **more)
        firsts.append(clock.times[0] - start)
        rates.append((new - WARM_UP) / (clock.times[-1] - clock.times[WARM_UP - 1]))
    return {"first": median(firsts[1:]), "rate": median(rates[1:]), "bytes": weights}


def in_pytorch(
    folder: Path, options: argparse.Namespace, dtype: str, is_int8: bool = False, is_compiled: bool = False
) -> dict[str, float]:
    model, _ = load(folder, dtype=dtype, device_map=None)
    if is_int8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model.llm.model.layers, Int8WeightOnlyConfig(version=2))
    weights = bytes_read(model.llm.model.layers, model.llm.lm_head)
    if not is_compiled:
        return generating(model, weights, options)
    cache = StaticCache(config=model.config, max_cache_len=options.prompt_tokens + options.new_tokens)
    compiling = CompileConfig(mode="default", dynamic=False)
    compiling._compile_all_devices = True  # the library compiles on accelerators only, unless asked
    return generating(model, weights, options, past_key_values=cache, compile_config=compiling)


def in_graphs(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    model, _ = load(folder)
    weights = sum(file.stat().st_size for file in folder.glob("decoder_model.*") if file.suffix != ".xml")
    return generating(model, weights, options)


def in_llama_cpp(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    file = language_model(folder)
    model, _ = load(file)
    return generating(model, gguf_bytes(file), options)


def in_stock_llama_cpp(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    import xllamacpp

    file = language_model(folder)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.verbosity = str(file), 1, 0
    params.n_ctx = options.prompt_tokens + options.new_tokens + 256
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    firsts, rates = [], []
    for place in range(1 + options.repeats):
        ids = prompt(place, options.prompt_tokens)[0].tolist()
        body = {"prompt": ids, "n_predict": options.new_tokens, "ignore_eos": True, "cache_prompt": False}
        timings = server.handle_completions(body | {"temperature": 0, "samplers": ["temperature"]})["timings"]
        firsts.append(timings["prompt_ms"] / 1e3)
        rates.append(timings["predicted_per_second"])
    return {"first": median(firsts[1:]), "rate": median(rates[1:]), "bytes": gguf_bytes(file)}


def language_model(folder: Path) -> Path:
    (file,) = (file for file in folder.glob("*.gguf") if not file.name.startswith("mmproj-"))
    return file


def gguf_bytes(file: Path) -> int:
    """Bytes of all that a token reads: embeddings are looked up, a row at a time, unless they are the head, too."""
    from minicpmv.runtimes.gguf_file import GGUFFile

    tensors = GGUFFile(file).tensors
    looked_up = {"token_embd.weight"} if "output.weight" in tensors else set()
    return sum(tensor.data.nbytes for name, tensor in tensors.items() if name not in looked_up)


def peak_memory() -> int:
    """Most bytes that this process has held; that of `resource` would count the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


ROADS: dict[str, Road] = {
    "pytorch, eager, float32": Road("torch", 4, partial(in_pytorch, dtype="float32")),
    "pytorch, eager, bfloat16": Road("torch", 2, partial(in_pytorch, dtype="bfloat16")),
    "pytorch, static, compiled, float32": Road("torch", 4, partial(in_pytorch, dtype="float32", is_compiled=True)),
    "pytorch, static, compiled, bfloat16": Road("torch", 2, partial(in_pytorch, dtype="bfloat16", is_compiled=True)),
    "pytorch, eager, torchao int8": Road("torchao", 2, partial(in_pytorch, dtype="bfloat16", is_int8=True)),
    "pytorch, static, compiled, torchao int8": Road(
        "torchao", 2, partial(in_pytorch, dtype="bfloat16", is_int8=True, is_compiled=True)
    ),
    "onnx, fp32": Road("onnxruntime", 4, in_graphs, ("onnx", "fp32")),
    "onnx, int8": Road("onnxruntime", 1.3, in_graphs, ("onnx", "int8")),
    "onnx, int4": Road("onnxruntime", 1, in_graphs, ("onnx", "int4")),
    "openvino, f16": Road("openvino", 4, in_graphs, ("openvino", "f16")),
    "openvino, int8": Road("openvino", 2, in_graphs, ("openvino", "int8")),
    "openvino, int4": Road("openvino", 2, in_graphs, ("openvino", "int4")),
    "gguf, f16": Road("xllamacpp", 2, in_llama_cpp, ("gguf", "f16")),
    "gguf, q8_0": Road("xllamacpp", 1.1, in_llama_cpp, ("gguf", "q8_0")),
    "gguf, q4_k_m": Road("xllamacpp", 0.7, in_llama_cpp, ("gguf", "q4_k_m")),
    "llama.cpp, stock, f16": Road("xllamacpp", 2, in_stock_llama_cpp, ("gguf", "f16")),
    "llama.cpp, stock, q8_0": Road("xllamacpp", 1.1, in_stock_llama_cpp, ("gguf", "q8_0")),
    "llama.cpp, stock, q4_k_m": Road("xllamacpp", 0.7, in_stock_llama_cpp, ("gguf", "q4_k_m")),
}


# ---- around the roads ----


def make_checkpoint(size: str, folder: Path) -> None:
    """A checkpoint of this size with random weights in bfloat16."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True)
    fields = {name: value for name, value in config.to_dict().items() if name != "layer_types"}
    vision = fields["vision_config"] | SIZES[size].get("vision_config", {})
    config = type(config)(**fields | SIZES[size] | {"vision_config": vision})
    model = AutoModel.from_config(config, trust_remote_code=True, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    original = json.loads((REPOSITORY / "config.json").read_text(encoding="utf-8"))
    for pattern in SMALL_FILES:
        for file in REPOSITORY.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(written | {"auto_map": original["auto_map"]}), encoding="utf-8")


def read_rate(repeats: int) -> float:
    """Bytes a second: the best of a sum and of a product of a matrix and a vector, over 256 MB."""
    matrix = torch.ones(8192, 8192)
    vector = torch.ones(8192)
    best = 0.0
    for function in (matrix.sum, lambda: torch.mv(matrix, vector)):
        function()
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            best = max(best, matrix.nbytes / (time.perf_counter() - start))
    return best


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def run(arguments: Sequence[str | Path]) -> str:
    """What a process of this Python prints.

    Raises:
        RuntimeError: it failed; the last line it wrote that names an error.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"ended with {done.returncode}").splitlines()
        named = [line for line in lines if re.match(r"[\w.]*Error\b", line)]  # torch.compile says more below it
        raise RuntimeError((named or lines)[-1][:300])
    return done.stdout


def exported(road: Road, checkpoint: Path, folder: Path) -> Path:
    """Where what the road reads is, written now if it is not there yet."""
    if road.export is None:
        return checkpoint
    target, kind = road.export
    output = folder / f"{target}-{kind}"
    if not output.is_dir():
        words = ["export", target, "--model", checkpoint, "--output", output, "--type", kind, "--no-check"]
        run(["-m", "minicpmv", *words])
    return output


def take(name: str, checkpoint: Path, folder: Path, options: argparse.Namespace) -> Figures | str:
    """The figures of a road, or why there are none."""
    road = ROADS[name]
    if find_spec(road.package) is None:
        return f"left out: {road.package} is not installed"
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 2
    needed = ROOM * road.bytes_per_weight * weights
    if needed > free_memory():
        return f"left out: it needs about {needed / 2**30:.0f} GiB, and {free_memory() / 2**30:.0f} are free"
    try:
        place = exported(road, checkpoint, folder)
        bandwidth = read_rate(5 * options.repeats)
        counts = ["--prompt-tokens", options.prompt_tokens, "--new-tokens", options.new_tokens]
        words = [__file__, "--measure", name, "--folder", place, *map(str, counts), "--repeats", str(options.repeats)]
        found = json.loads(run(words).splitlines()[-1])
    except RuntimeError as error:
        return f"failed: {error}"
    rest = found["bytes"] / 1e9, bandwidth / 1e9, found["peak"] / 2**30
    return Figures(name, found["first"] * 1e3, found["rate"], *rest)


def line(figures: Figures, eager: float | None) -> str:
    against = "" if eager is None else f"{figures.tokens_per_second / eager:.1f} x"
    return (
        f"{figures.road:42}{figures.first_token_ms:>10,.0f} ms{figures.tokens_per_second:>9.1f}{against:>8}"
        f"{figures.weights_gb:>9.2f}{figures.bandwidth:>9.1f}{figures.share:>8.0%}{figures.peak_gib:>10.2f}"
    )


HEADING = (
    f"{'road':42}{'first token':>13}{'tokens/s':>9}{'eager':>8}{'GB read':>9}{'GB/s':>9}{'share':>8}{'peak GiB':>10}"
)


def main(arguments: Sequence[str] | None = None) -> list[Figures]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.5b", help="of the checkpoint")
    parser.add_argument("--roads", nargs="+", default=[""], help="by the beginning of their names")
    parser.add_argument("--prompt-tokens", type=int, default=600)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep checkpoint and exports here, for the next run")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", choices=ROADS, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.new_tokens <= WARM_UP:
        parser.error(f"--new-tokens must be more than {WARM_UP}")
    if options.measure:  # in the road's own process
        found = ROADS[options.measure].measure(options.folder, options)
        print(json.dumps(found | {"peak": peak_memory()}))
        return []
    if options.make:
        make_checkpoint(options.size, options.make)
        return []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        return compare(folder, options)


def compare(folder: Path, options: argparse.Namespace) -> list[Figures]:
    checkpoint = REPOSITORY / "nano" if options.size == "nano" else folder / options.size
    if not checkpoint.is_dir():
        run([__file__, "--make", checkpoint, "--size", options.size])
    packages = ("torch", "transformers", "torchao", "onnxruntime", "openvino", "xllamacpp")
    machine = {name: version(name) for name in packages if find_spec(name)} | {"threads": torch.get_num_threads()}
    print(f"{options.size}, a prompt of {options.prompt_tokens} tokens, {machine}\n{HEADING}", flush=True)
    measured: list[Figures] = []
    left_out: dict[str, str] = {}
    for name in ROADS:
        if not name.startswith(tuple(options.roads)):
            continue
        found = take(name, checkpoint, folder / f"{options.size}-exports", options)
        if isinstance(found, str):
            left_out[name] = found
            print(f"{name:42} {found}", flush=True)
        else:
            measured.append(found)
            is_eager = measured[0].road == next(iter(ROADS))
            print(line(found, measured[0].tokens_per_second if is_eager else None), flush=True)
        if options.json:
            rows = [asdict(figures) | {"share": figures.share} for figures in measured]
            report = {"size": options.size, "machine": machine, "measured": rows, "left out": left_out}
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return measured


if __name__ == "__main__":
    main()
