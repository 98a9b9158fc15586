"""Models behind an endpoint: what is sent, what is made of the reply, and what happens when it fails."""

import base64
import io
import json
import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import NANO, REPOSITORY
from PIL import Image
from typer.testing import CliRunner

from minicpmv.commands.evaluate import evaluate_app
from minicpmv.evaluate import Endpoint, LocalModel, figures, load_benchmark, measure
from minicpmv.evaluate.answerers import Question
from minicpmv.evaluate.benchmark import Benchmark, Prompt, Row, Subtitles
from minicpmv.evaluate.endpoint import EndpointError, even_frames
from minicpmv.evaluate.sample_log import SampleKey, read_entries
from minicpmv.evaluate.scoring.drawn import exact_match


CLIP = REPOSITORY / "assets" / "star.mp4"


def completion(text="red", **message):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


class Server:
    """An endpoint on loopback. `reply(number, body)` gives (status, JSON) for each chat completion that is asked for."""

    def __init__(self, reply=lambda number, body: (200, completion()), models=("m",)):
        self.requests, self.headers, self.lock = [], [], threading.Lock()
        self.in_flight, self.most_in_flight = 0, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if models is None:
                    return self.send(404, {"error": {"message": "no such route"}})
                cards = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in models]
                return self.send(200, {"object": "list", "data": cards})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(body)
                    server.headers.append(self.headers)
                    number = len(server.requests) - 1
                    server.in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server.in_flight)
                try:
                    status, content = reply(number, body)
                finally:
                    with server.lock:
                        server.in_flight -= 1
                with suppress(ConnectionError):  # who asked was stopped: nobody's error
                    self.send(status, content)

            def send(self, status, content):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(content, bytes) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def serving(*arguments, **options):
    server = Server(*arguments, **options)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()


def row_of(*content, expected="red", **changes):
    return Row("r", "R", lambda seed, index: index, lambda index: Prompt([*content], expected), exact_match, **changes)


def one_answer(server, *content, mode=False, options=None, **settings):
    """What the endpoint's reply to one question becomes."""
    row = row_of(*content or ["What?"])
    question = Question(SampleKey("r", 0, 0), row)
    question.prompt.options.update(options or {})
    ((_, answer),) = Endpoint(server.url, "m", **settings).answer([question], mode, 32)
    return answer


def run(server, folder, row=None, samples=5, **settings):
    benchmark = Benchmark("b", "B", 1, (row or row_of("What?"),))
    return measure(Endpoint(server.url, "m", **settings), benchmark, folder, name="m", samples=samples)


# --- What is sent, and what comes back ---


def test_answers_become_figures_and_lines_of_the_log(tmp_path):
    def reply(number, body):
        return 200, completion("red" if number % 2 else "blue")

    with serving(reply) as server:
        results = run(server, tmp_path, samples=4)
    assert figures(results) == {"r": {"exact": 0.5, "n": 4}} and results["rows"]["r"]["tokens"] == 2
    entry = read_entries(tmp_path / "samples.jsonl")[0]
    assert (entry["question"], entry["prompt_tokens"], entry["finish_reason"]) == ("What?", 7, "stop")
    assert results["settings"]["endpoint"] == server.url and results["settings"]["model"] == "m"


def test_a_request_asks_greedily_with_the_limit_of_the_row():
    with serving() as server:
        one_answer(server)
    (request,) = server.requests
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0, 32)
    assert request["messages"] == [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    assert request["chat_template_kwargs"] == {"enable_thinking": False} and "mm_processor_kwargs" not in request


def test_the_name_of_a_region_is_sent_in_the_text():
    with serving() as server:
        one_answer(server, {"type": "text", "text": "Where is ", "ref": "the red star"})
    (part,) = server.requests[0]["messages"][0]["content"]
    assert part == {"type": "text", "text": "Where is <ref>the red star</ref>"}


def pixels(part):
    kind, data = part["image_url"]["url"].split(";base64,")
    assert kind == "data:image/png"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_images_keep_every_pixel_and_files_every_byte():
    drawn = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8))
    file, address = REPOSITORY / "assets" / "number.jpg", "https://example.org/a.png"
    with serving() as server:
        one_answer(server, drawn, file, {"type": "image_url", "image_url": {"url": address}}, "Which?")
    first, second, third, text = server.requests[0]["messages"][0]["content"]
    assert (pixels(first) == np.asarray(drawn)).all()
    kind, data = second["image_url"]["url"].split(";base64,")
    assert kind == "data:image/jpeg" and base64.b64decode(data) == file.read_bytes()
    assert third["image_url"]["url"] == address and text == {"type": "text", "text": "Which?"}


def test_a_clip_is_sent_as_even_frames_or_as_its_file():
    with serving() as server:
        one_answer(server, CLIP, "What?", frames=4)
        one_answer(server, {"type": "video", "video": str(CLIP)}, "What?", clips="video_url")
    frames, whole = (request["messages"][0]["content"] for request in server.requests)
    assert [part["type"] for part in frames] == ["image_url"] * 4 + ["text"]
    every = even_frames(CLIP, 10_000)
    expected = [every[round(place * (len(every) - 1) / 3)] for place in range(4)]
    assert all((pixels(part) == np.asarray(frame)).all() for part, frame in zip(frames, expected, strict=False))
    kind, data = whole[0]["video_url"]["url"].split(";base64,")
    assert kind == "data:video/mp4" and base64.b64decode(data) == CLIP.read_bytes()


def test_subtitles_are_those_of_the_frames_that_are_sent():
    lines = tuple((second, second + 0.4, f"line {second}") for second in range(10))
    parts = [{"type": "video", "video": str(CLIP)}, Subtitles(lines, before="Subtitles:\n"), "What?"]
    with serving() as server:
        answer = one_answer(
            server, *parts, frames=2, options={"fps": 5, "max_num_frames": 180, "max_inp_length": 9999}
        )
    content = server.requests[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url"] * 2 + ["text"] * 2
    first, last = answer.media["timestamps"]
    assert first == 0 and last > 1 and answer.media["frames"] == 2 and answer.seconds > 0
    expected = Subtitles(lines, before="Subtitles:\n").shown_at([first, last])
    assert content[2]["text"] == expected and expected.startswith("Subtitles:\nline 0")
    with serving() as server, pytest.raises(EndpointError, match="subtitles need one video"):
        one_answer(server, parts[1], "What?")


def test_beams_of_a_row_give_way_to_the_temperature_of_the_run():
    beams = {"decoding": "beam", "num_beams": 3, "repetition_penalty": 1.2}
    with serving() as server:
        with pytest.raises(EndpointError, match="num_beams=3.*cannot be told"):
            one_answer(server, options=beams)
        one_answer(server, options=beams, temperature=0.0)
    (request,) = server.requests
    assert request["temperature"] == 0 and "num_beams" not in request and "repetition_penalty" not in request


def test_a_seed_in_words_is_sent_as_a_number_of_its_own():
    sampled = {"decoding": "sample", "temperature": 0.7, "num_beams": 1}
    with serving() as server:
        for seed in ("mmstar/0/1", "mmstar/0/2", "mmstar/0/1"):
            one_answer(server, options=sampled | {"seed": seed})
    first, second, again = (request["seed"] for request in server.requests)
    assert first == again != second and 0 <= first < 2**31


def test_options_of_a_request_can_be_chosen():
    options = {"max_slice_nums": 1, "temporal_ids": [[0]]}
    with serving() as server:
        one_answer(server, options=options, processor_options=True, extra_body={"top_k": 1}, thinking_switch=False)
    (request,) = server.requests
    assert request["mm_processor_kwargs"] == {"max_slice_nums": 1} and request["top_k"] == 1
    assert "chat_template_kwargs" not in request


def test_a_row_can_sample_at_its_own_temperature():
    with serving() as server:
        one_answer(server, options={"decoding": "sample", "temperature": 0.7, "top_k": 20, "seed": 3})
    (request,) = server.requests
    assert (request["temperature"], request["top_k"], request["seed"]) == (0.7, 20, 3)


def test_an_api_with_other_habits_is_asked_in_its_own_way():
    habits = {
        "token_parameter": "max_completion_tokens",
        "temperature": None,
        "reasoning_effort": "high",
        "thinking_switch": False,
    }
    with serving() as server:
        one_answer(server, options={"decoding": "sample", "temperature": 0.7, "top_k": 20}, **habits)
        one_answer(server, options={"decoding": "beam"}, temperature=0.3, token_parameter=None)
    first, second = server.requests
    assert set(first) == {"model", "messages", "max_completion_tokens", "reasoning_effort"}
    assert (first["max_completion_tokens"], first["reasoning_effort"]) == (32, "high")
    assert second["temperature"] == 0.3 and "max_tokens" not in second


def test_images_carry_the_detail_that_is_asked_for_and_frames_can_be_made_smaller():
    with serving() as server:
        one_answer(server, REPOSITORY / "assets" / "number.jpg", CLIP, "What?", detail="low", frames=2, frame_size=64)
    image, first, second, text = server.requests[0]["messages"][0]["content"]
    assert [part["image_url"]["detail"] for part in (image, first, second)] == ["low"] * 3 and text["type"] == "text"
    kind, data = first["image_url"]["url"].split(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as frame:
        assert (kind, frame.format, max(frame.size)) == ("data:image/jpeg", "JPEG", 64)


def test_what_every_request_says_is_part_of_the_settings():
    plain, other = Endpoint("http://127.0.0.1:1/v1", "m"), Endpoint("http://127.0.0.1:1/v1", "m", detail="high")
    assert plain.settings(False)["temperature"] == "question" and plain.settings(False) != other.settings(False)


@pytest.mark.parametrize("options", [{"decoding": "beam"}, {"decoding": "sample"}, {"no_repeat_ngram_size": 3}])
def test_what_an_endpoint_cannot_be_told_is_refused_rather_than_left_out(options):
    with (
        serving() as server,
        pytest.raises(EndpointError, match=rf"r .* wants {next(iter(options))}=.*leave this row out"),
    ):
        one_answer(server, options=options)
    assert not server.requests


@pytest.mark.parametrize(
    "reply",
    [
        completion("blue", reasoning_content="I see."),
        completion("blue", reasoning="I see."),
        completion("<think>\nI see.\n</think>\n\nblue"),
        completion("I see.\n</think>\n\nblue"),
    ],
)
def test_a_thought_is_parted_from_the_answer(reply):
    with serving(lambda number, body: (200, reply)) as server:
        answer = one_answer(server, mode=True)
    assert (answer.text, answer.thought, answer.mode) == ("blue", "I see.", "deep")
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": True}


def test_where_nothing_was_to_be_thought_the_whole_reply_is_the_answer():
    with serving(lambda number, body: (200, completion("I see.</think>blue"))) as server:
        assert one_answer(server).text == "I see.</think>blue"


def test_an_endpoint_cannot_think_on_demand():
    with pytest.raises(EndpointError, match="cannot think on demand"):
        Endpoint("http://127.0.0.1:1/v1", "m").settings("auto")


# --- Many questions ---


def test_no_more_requests_are_in_flight_than_allowed_and_not_fewer(tmp_path):
    gate = threading.Barrier(3, timeout=60)

    def reply(number, body):
        gate.wait()  # opens for three at a time
        return 200, completion()

    with serving(reply) as server:
        run(server, tmp_path, samples=12, concurrency=3)
    assert server.most_in_flight == 3 and len(server.requests) == 12


def test_a_run_that_failed_goes_on_with_what_is_missing(tmp_path):
    def breaks(number, body):
        return (200, completion()) if number < 3 else (400, {"error": {"message": "too long"}})

    with serving(breaks) as server:
        with pytest.raises(EndpointError, match=r"refuses question \d of r \(seed 0\).*too long"):
            run(server, tmp_path, samples=6, concurrency=1)
        port = server.http.server_port
    answered = len(read_entries(tmp_path / "samples.jsonl"))
    assert answered == 3

    again = Server()
    again.http.server_close()
    again.http = ThreadingHTTPServer(("127.0.0.1", port), again.http.RequestHandlerClass)
    thread = threading.Thread(target=again.http.serve_forever, args=(0.01,))
    thread.start()
    again.url = server.url
    results = run(again, tmp_path, samples=6)
    again.http.shutdown()
    thread.join()
    again.http.server_close()
    assert len(again.requests) == 3 and results["rows"]["r"]["n"] == 6


def test_answers_under_way_are_kept_when_another_question_fails(tmp_path):
    gate = threading.Barrier(3, timeout=60)

    def reply(number, body):
        if number < 3:
            gate.wait()
        return (400, {"error": {"message": "no"}}) if number == 0 else (200, completion())

    with serving(reply) as server, pytest.raises(EndpointError, match="refuses question"):
        run(server, tmp_path, samples=9, concurrency=3)
    assert 2 <= len(read_entries(tmp_path / "samples.jsonl")) == len(server.requests) - 1


def test_an_interrupted_run_waits_for_no_answer(tmp_path):
    hanging = threading.Event()

    def reply(number, body):
        if number == 1:
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        if number:
            hanging.wait(60)
        return 200, completion()

    with serving(reply) as server:
        with pytest.raises(KeyboardInterrupt):
            run(server, tmp_path, samples=4, concurrency=2)
        assert len(read_entries(tmp_path / "samples.jsonl")) == 1 and not hanging.is_set()
        hanging.set()


# --- Failures ---


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_passing_failure_is_tried_again(status):
    def reply(number, body):
        return (200, completion()) if number == 2 else (status, {"error": {"message": "busy"}})

    with serving(reply) as server:
        assert one_answer(server).text == "red"
    assert len(server.requests) == 3


def test_a_timeout_is_tried_again_and_then_named():
    def reply(number, body):
        time.sleep(1.5 * (number != 1))
        return 200, completion()

    with serving(reply) as server:
        assert one_answer(server, timeout=1, retries=1).text == "red"
        with pytest.raises(EndpointError, match="took too long.*--timeout"):
            one_answer(server, timeout=1, retries=0)


@pytest.mark.parametrize(
    ("status", "content", "part"),
    [
        (503, {"error": {"message": "overloaded"}}, "failed on every try.*overloaded"),
        (429, {"error": {"message": "slow down"}}, "failed on every try.*--concurrency.*slow down"),
        (401, {"error": {"message": "bad key"}}, "refuses the key.*--api-key-env.*bad key"),
        (404, {"error": {"message": "nothing here"}}, "knows no model m.*nothing here"),
        (400, {"error": {"message": "context is 4096"}}, r"refuses question 0 of r \(seed 0\).*context is 4096"),
        (200, b"<html>hello</html>", "did not answer question 0 of r .* with a chat completion"),
        (200, {"choices": []}, "did not answer question 0 of r .* with a chat completion"),
    ],
)
def test_a_lasting_failure_is_explained(status, content, part):
    with serving(lambda number, body: (status, content)) as server, pytest.raises(EndpointError, match=part):
        one_answer(server, retries=1)


def command(*arguments):
    return CliRunner().invoke(evaluate_app, ["nanobench", "--samples", "1", "--rows", "shape", *map(str, arguments)])


def message(*arguments):
    result = command(*arguments)
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_the_command_says_what_is_wrong_before_it_asks_anything(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    output = ("--output", tmp_path / "run")
    with serving(models=("a", "b")) as server:
        assert "does not serve m; it serves a, b" in message("--endpoint", server.url, "-m", "m", *output)
        assert "--endpoint also needs --model" in message("--endpoint", server.url, *output)
        no_key = ("--api-key-env", "NO_SUCH_KEY")
        assert "no variable NO_SUCH_KEY" in message("--endpoint", server.url, "-m", "a", *no_key, *output)
        assert "cannot think on demand" in message("--endpoint", server.url, "-m", "a", "--thinking", "auto", *output)
    refused = message("--endpoint", server.url, "-m", "a", "--retries", 0, *output)
    assert f"{server.url} cannot be reached" in refused and "is the server running" in refused
    assert "is not an address" in message("--endpoint", "localhost:8000", "-m", "a", *output)
    assert not server.requests and not (tmp_path / "run").exists()


def test_the_key_is_sent_and_stored_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    with serving(models=None) as server:  # it does not tell which models it has
        result = command("--endpoint", server.url, "-m", "m", "--api-key-env", "MY_KEY", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert server.headers[0]["Authorization"] == "Bearer secret-key"
    stored = "".join(path.read_text() for path in (tmp_path / "run").iterdir())
    assert "secret" not in stored + result.output and server.url in stored


def test_a_password_in_the_address_is_neither_shown_nor_stored():
    with serving(models=("a",)) as server:
        endpoint = Endpoint(server.url.replace("//", "//me:secret-word@"), "m")
        assert endpoint.settings(False)["endpoint"] == server.url
        with pytest.raises(EndpointError, match="does not serve m") as caught:
            endpoint.check()
    assert "secret" not in str(caught.value)


# --- A real server ---


@pytest.mark.slow
def test_nano_answers_through_its_server_as_it_does_here(nano, tmp_path, warm_python):
    arguments = [warm_python, "-m", "minicpmv", "serve", "-m", str(NANO), "--port", "0"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(arguments, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[3]
        benchmark, rows = load_benchmark("nanobench"), ["shape", "fine_print_unsliced", "multistep_deep"]
        options = {"rows": rows, "samples": 3}
        there = Endpoint(url, "nano", processor_options=True)
        there.check()
        with pytest.raises(EndpointError, match="does not serve other; it serves nano"):
            Endpoint(url, "other").check()
        measure(there, benchmark, tmp_path / "there", name="nano", **options)
    finally:
        server.terminate()
        server.wait()
    measure(LocalModel(*nano), benchmark, tmp_path / "here", name="nano", **options)
    names = ("row", "index", "answer", "thought", "mode", "finish_reason", "prompt_tokens", "scores")
    here, there = (
        sorted(tuple(map(str, (entry[name] for name in names))) for entry in read_entries(folder / "samples.jsonl"))
        for folder in (tmp_path / "here", tmp_path / "there")
    )
    assert here == there and len(here) == 9
