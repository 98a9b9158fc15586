"""A server over loopback, asked by the client of openai; and the command that starts it."""

import importlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import httpcore
import openai
import pytest
from conftest import REPOSITORY
from serving_requests import (
    ASSETS,
    ENDLESS,
    NUMBER,
    QUESTION,
    SHAPES,
    STAR,
    THINK,
    body_of,
    chat,
    data_url,
    nano_engine,
    part,
    served,
)
from typer.testing import CliRunner

from minicpmv.commands.main import app
from minicpmv.serving.app import build_app


NANO = REPOSITORY / "nano"


@pytest.fixture(scope="module")
def engine(nano):
    with nano_engine(nano) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine):
    with served(build_app(engine)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def files():
    """Address of a server of the images in assets/. /moved leads to them under another name of the machine."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=ASSETS)

        def do_GET(self):
            name = {"/moved": "localhost", "/moved-here": "127.0.0.1"}.get(self.path)
            if name is None:
                return super().do_GET()
            self.send_response(302)
            self.send_header("Location", f"http://{name}:{self.server.server_port}/number.jpg")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(client, *content, **options):
    extra = {name: options.pop(name) for name in ("chat_template_kwargs", "enable_thinking") if name in options}
    return client.chat.completions.create(model="nano", **body_of(*content, **options), extra_body=extra)


def answer_of(response):
    return response.choices[0].message.content


# ---- the client of openai ----


def test_an_answer_is_that_of_chat(client, nano):
    response, expected = ask(client, NUMBER, SHAPES, QUESTION), chat(nano, NUMBER, SHAPES, QUESTION)
    assert answer_of(response) == expected.text
    assert response.usage.prompt_tokens == expected.prompt_tokens


def test_a_stream_holds_thought_and_answer(client):
    message = ask(client, NUMBER, QUESTION, max_tokens=64, **THINK).choices[0].message
    deltas = [chunk.choices[0].delta for chunk in ask(client, NUMBER, QUESTION, max_tokens=64, stream=True, **THINK)]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == message.reasoning_content != ""


def test_parsed_answers_and_tool_helpers_of_the_client_work(client):
    from pydantic import BaseModel

    class Color(BaseModel):
        color: bool

    request = body_of(SHAPES, "Is it red?", max_tokens=64)
    parsed = client.chat.completions.parse(model="nano", response_format=Color, **request)
    assert parsed.choices[0].message.parsed.color in (True, False)
    tools = [openai.pydantic_function_tool(Color)]
    with client.chat.completions.stream(model="nano", tools=tools, tool_choice="required", **request) as stream:
        kinds = {event.type for event in stream}
    assert "tool_calls.function.arguments.done" in kinds
    (call, *_) = stream.get_final_completion().choices[0].message.tool_calls
    assert call.function.parsed_arguments.color in (True, False)


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.NotFoundError, match="nano"):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, "Hello", temperature=-1)
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, "x" * 5_000_000)
    assert error.value.status_code == 413
    assert [model.id for model in client.models.list()] == ["nano"]


# ---- images from addresses ----


def test_an_image_may_come_from_an_address(client, files):
    expected = ask(client, NUMBER, QUESTION)
    for address in (f"{files}/number.jpg", f"{files}/moved-here"):
        response = ask(client, address, QUESTION)
        assert answer_of(response) == answer_of(expected)
        assert response.usage.prompt_tokens == expected.usage.prompt_tokens


def test_what_an_address_answers_is_checked(client, files):
    for path, reason in [("/nowhere.jpg", "404"), ("/README.md", "not an image"), ("/moved", "public internet")]:
        with pytest.raises(openai.BadRequestError, match=reason):
            ask(client, f"{files}{path}", QUESTION)


def test_a_file_larger_than_the_limit_is_not_fetched_to_its_end(client):
    sent = []

    def serve(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
            try:
                for _ in range(64):
                    sent.append(connection.send(bytes(1_000_000)))
            except OSError:
                pass  # what this test waits for: the other side has hung up

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with pytest.raises(openai.BadRequestError, match="larger than 4 MB"):
            ask(client, f"http://127.0.0.1:{listener.getsockname()[1]}/endless.png", QUESTION)
        thread.join(timeout=20)
    assert sum(sent) < 32_000_000


# ---- clients that go ----


def assert_free(engine):
    """Nothing is written. The 4000 tokens that were asked for take nano longer than the limit here."""
    deadline = time.monotonic() + 12
    while engine.stats().running or engine.stats().waiting:
        assert time.monotonic() < deadline, "the server works on for a client that has gone"
        time.sleep(0.01)


def test_a_stream_that_is_closed_stops_the_work(client, engine):
    stream = ask(client, "Hello", stream=True, max_tokens=4000, **ENDLESS)
    for _, chunk in zip(range(10), stream, strict=False):
        assert chunk.choices[0].finish_reason is None
    assert engine.stats().running == 1
    stream.close()
    assert_free(engine)


def test_a_request_whose_client_has_gone_stops_the_work(client, engine):
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5), "Hello", max_tokens=4000, **ENDLESS)
    assert_free(engine)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_before_its_answer_begins_leaves_no_work(client, engine, address, stream):
    messages = [{"role": "user", "content": [part(SHAPES), part(QUESTION)]}]
    body = json.dumps({"messages": messages, "stream": stream, "max_tokens": 4000, **ENDLESS}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    host, port = address.removeprefix("http://").split(":")
    for seconds in (0.0, 0.01, 0.1):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            time.sleep(seconds)
    assert answer_of(ask(client, NUMBER, QUESTION))
    assert_free(engine)
    assert engine.bytes.taken == 0


def test_streams_at_the_same_time_get_what_each_gets_alone(client):
    questions = ["Hello", "What do you see?", "How many digits are there?", "Why?"]

    def read(question):
        stream = ask(client, question, stream=True, max_tokens=24, **ENDLESS)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    alone = [read(question) for question in questions]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, questions)) == alone


# ---- heavy requests ----


@pytest.fixture
def gate(monkeypatch):
    """A function (target) that makes calls of it wait until `gate.open()`; `gate.waiting()` returns when two of them do."""
    here, opened = threading.Semaphore(0), threading.Event()

    def put_before(target):
        module, _, name = target.rpartition(".")
        function = getattr(importlib.import_module(module), name)

        def wait(*arguments, **options):
            here.release()
            assert opened.wait(60)
            return function(*arguments, **options)

        monkeypatch.setattr(target, wait)

    put_before.waiting = lambda: all(here.acquire(timeout=60) for _ in range(2))
    put_before.open = opened.set
    yield put_before
    opened.set()


@pytest.mark.parametrize(
    ("target", "content", "answer"),
    [("PIL.Image.open", [NUMBER, QUESTION], "47"), ("av.open", [STAR, "What color is the shape?"], "red")],
    ids=["the header of an image", "the frames of a video"],
)
def test_others_are_answered_while_images_and_videos_are_read(client, address, gate, target, content, answer):
    gate(target)
    with ThreadPoolExecutor(3) as pool:
        heavy = [pool.submit(ask, client, *content) for _ in range(3)]
        assert gate.waiting() and not any(request.done() for request in heavy)
        assert httpcore.request("GET", f"{address}/health").status == 200
        assert [model.id for model in client.models.list()] == ["nano"]
        assert ask(client, "Hello", max_tokens=2).usage.completion_tokens > 0
        assert not any(request.done() for request in heavy)
        gate.open()
        assert [answer_of(request.result()) for request in heavy] == [answer] * 3


def test_a_server_tells_its_health_while_all_its_threads_are_at_work(client, address, gate):
    gate("minicpmv.serving.app.read_request")
    with ThreadPoolExecutor(50) as pool:
        requests = [pool.submit(ask, client, "Hello", max_tokens=1) for _ in range(50)]
        assert gate.waiting()
        assert httpcore.request("GET", f"{address}/health").status == 200
        gate.open()
        assert all(request.result().usage.completion_tokens for request in requests)


# ---- the command ----


def test_a_server_that_was_started_answers_and_its_log_cannot_be_forged(tmp_path):
    command = [sys.executable, "-m", "minicpmv", "serve", "-m", str(NANO), "--port", "0", "--served-name", "tiny"]
    with (tmp_path / "log").open("w") as output:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True, cwd=REPOSITORY)
    try:
        line = process.stdout.readline()
        found = re.match(r"tiny answers at (http://127\.0\.0\.1:\d+)/v1", line)
        assert found, line + (tmp_path / "log").read_text()
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=20, timeout=60)
        assert [model.id for model in client.models.list()] == ["tiny"]
        forged = b'\x1aE\xdf\xa3\n{"level": "error", "message": "forged"}\n\x1b[31m' * 20
        video = {"type": "video_url", "video_url": {"url": data_url(forged, "video/webm")}}
        with pytest.raises(openai.BadRequestError, match="video"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [video]}])
        evil = httpcore.request("GET", f"{found[1]}/v1/models", headers={"Host": "evil.example"})
        assert evil.status == 403
    finally:
        process.terminate()
        process.wait(timeout=60)
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert [json.loads(line)["status"] for line in lines if '"request"' in line] == [200, 400, 403]
    assert "forged" not in "".join(json.loads(line)["message"] for line in lines)
    log = (tmp_path / "log").read_text()
    assert '"message": "forged"' not in log and "\x1b" not in log and "Traceback" not in log


def assert_one_line_error(*arguments, parts):
    result = CliRunner().invoke(app, ["serve", "-m", *map(str, arguments)])
    assert result.exit_code == 1
    assert result.stderr.startswith("minicpmv: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts)
    assert result.stdout == ""


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("uvicorn", "vllm") else name)
    assert_one_line_error(NANO, parts=["uvicorn", ".[serve]"])


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line_error("no-such-model", "--port", port, parts=[f"127.0.0.1:{port}", "--port"])


def test_a_model_that_is_not_there_is_a_one_line_error():
    assert_one_line_error("no-such-model", "--port", 0, parts=["no-such-model", "--trust-remote-code"])


def test_an_engine_that_does_not_fit_the_model_is_refused():
    assert_one_line_error(NANO, "--engine", "llama.cpp", parts=["no GGUF file", "export gguf"])
    assert_one_line_error(NANO, "--engine", "vllm", "--prefix-megabytes", 1, parts=["--prefix-megabytes", "vLLM"])
    assert_one_line_error(NANO, "--engine", "transformers", "--", "--port", parts=["vLLM", "leave them out"])
