"""Each kind of answerer answers the rows of a batch, or says why it cannot."""

import fcntl
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import NANO, REPOSITORY

from minicpmv import checkpoint
from minicpmv.batch.answerers import AnswererOptions, EngineError
from minicpmv.batch.jobs import Asked
from minicpmv.batch.run import open_batch


QUESTIONS = {"number.jpg": "What does it say?", "sum.jpg": "What is the result?"}


@pytest.fixture
def here(nano, monkeypatch):
    """Options of nano in this process, which is loaded already."""
    monkeypatch.setattr(checkpoint, "load", lambda *names, **options: nano)
    return AnswererOptions(str(NANO), concurrency=4)


@pytest.fixture
def chat_api():
    """(address, requests) of an API that says the last message again."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(
                {"object": "list", "data": [{"id": "echo", "object": "model", "created": 0, "owned_by": "test"}]}
            )

        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": requests[-1]["messages"][-1]["content"]}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": "echo", "choices": [choice]})

        def reply(self, content):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", requests
    server.shutdown()


def answer(source, output, options, asked):
    with open_batch(source, output, options, asked) as batch:
        return {row["id"]: row for row in batch.rows}


def test_nano_answers_about_files(here, tmp_path):
    rows = [{"id": name, "image": name, "prompt": question} for name, question in QUESTIONS.items()]
    rows += [{"id": "mine", "messages": [{"role": "user", "content": [{"type": "image", "image": "sum.jpg"}, "Hi"]}]}]
    rows += [{"id": "film", "video": "star.mp4", "prompt": "What color is the shape?"}]
    for name in (*QUESTIONS, "star.mp4"):
        shutil.copy(REPOSITORY / "assets" / name, tmp_path)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"temperature": 0, "max_tokens": 16}
    found = answer(tmp_path / "in.jsonl", tmp_path / "out.jsonl", here, Asked(fields=fields))
    assert [found[name]["text"] for name in ("number.jpg", "sum.jpg", "film")] == ["47", "12", "red"]
    assert found["number.jpg"]["prompt_tokens"] > 64 and found["number.jpg"]["finish_reason"] == "stop"
    assert found["mine"]["text"] is None and "content" in found["mine"]["error"]  # a part has a type


def test_nano_does_every_task_on_a_folder(here, tmp_path):
    films, papers = tmp_path / "films", tmp_path / "papers"
    for folder, name in ((films, "star.mp4"), (papers, "sum.jpg")):
        folder.mkdir()
        shutil.copy(REPOSITORY / "assets" / name, folder)
    short = {"temperature": 0, "max_tokens": 4}
    asked = Asked("describe", "What color is the shape?", seconds=1, fields=short)
    (row,) = answer(films, tmp_path / "told.jsonl", here, asked).values()
    assert row["error"] is None and [segment["text"] for segment in row["segments"]] == ["red", "red"]
    (row,) = answer(papers, tmp_path / "read.jsonl", here, Asked("read", fields=short)).values()
    assert row["error"] is None and row["pages"] == 1 and row["completion_tokens"] <= 4
    (row,) = answer(papers, tmp_path / "caption.jsonl", here, Asked("caption", fields=short)).values()
    assert row["error"] is None and row["text"]


def test_an_engine_that_cannot_run_the_model_is_refused(tmp_path):
    with pytest.raises(EngineError, match="no GGUF file: minicpmv export gguf"):
        AnswererOptions(str(NANO), "llama.cpp").open()


def test_an_endpoint_answers_and_where_it_is_gone_the_run_ends(tmp_path, chat_api):
    url, requests = chat_api
    rows = [{"id": place, "messages": [{"role": "user", "content": f"text {place}"}]} for place in range(5)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = AnswererOptions("echo", endpoint=url, concurrency=2, retries=0)
    found = answer(tmp_path / "in.jsonl", tmp_path / "out.jsonl", options, Asked())
    assert {place: row["text"] for place, row in found.items()} == {place: f"text {place}" for place in range(5)}
    assert all(request["model"] == "echo" for request in requests)
    gone = AnswererOptions("echo", endpoint="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(ValueError, match="cannot be reached"):
        answer(tmp_path / "in.jsonl", tmp_path / "other.jsonl", gone, Asked())


# ---- a server of its own ----

# In place of vLLM's: answers who has the key, and has a process beside it, which keeps a lock.
SERVER = """
import fcntl, http.server, os, sys
key, lock = os.environ["MINICPMV_API_KEY"], open({lock!r}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        knows = self.path == "/health" or self.headers["Authorization"] == "Bearer " + key
        self.send_response(200 if knows else 401)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{{"object": "list", "data": []}}')
if os.fork():
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
import time
time.sleep(120)
"""

# A run whose server says when it begins, and holds stderr as long as it lives.
# Where a shell started the tests in the background, they ignore Ctrl-C, and so would what they start.
RUN = """
import os, signal, sys, time
from minicpmv.batch.answerers import start_child
signal.signal(signal.SIGINT, signal.default_int_handler)
start_child(["sh", "-c", "echo begun >&2; exec sleep 120"], os.environ)
{end}
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A function that makes a text the program of `sys.executable`."""

    def write(text):
        program = tmp_path / "python"
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return write


def test_a_server_that_does_not_start_ends_the_run(stand_in):
    stand_in("#!/bin/sh\nexit 3\n")
    with pytest.raises(EngineError, match="exit code 3"):
        AnswererOptions(str(NANO), "vllm").open()


def test_a_server_outlives_the_thread_that_began_it_and_ends_with_all_that_it_began(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("MINICPMV_API_KEY", "of another server")
    lock = tmp_path / "lock"
    (tmp_path / "server.py").write_text(SERVER.format(lock=str(lock)))
    stand_in(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-S", "-E", str(tmp_path / "server.py")])} "$@"\n')
    with ThreadPoolExecutor(1) as pool:
        answerer = pool.submit(AnswererOptions(str(NANO), "vllm", api_key="of an endpoint").open).result()
    answerer.client.check()
    with lock.open("w") as file:

        def is_free():
            with suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None

        assert not is_free()
        answerer.close()
        deadline = time.monotonic() + 60
        while not is_free():
            assert time.monotonic() < deadline, "a process that the server began goes on"
            time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_with_a_run_that_is_killed(number):
    command = [sys.executable, "-c", RUN.format(end="time.sleep(120)")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr.readline() == "begun\n"
        run.send_signal(number)
        run.communicate(timeout=60)  # until nobody holds stderr any more


def test_a_server_ends_with_a_run_that_fails():
    command = [sys.executable, "-c", RUN.format(end="raise KeyError")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and "KeyError" in run.stderr
