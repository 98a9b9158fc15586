"""The HTTP side, without a socket: what is answered, what is refused, and how."""

import io
import json
import logging
import os
import struct
import time
import zlib

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image
from serving_requests import (
    ENDLESS,
    NUMBER,
    QUESTION,
    STAR,
    THINK,
    body_of,
    client_of,
    data_url,
    nano_engine,
    part,
)

from minicpmv.serving.app import build_app
from minicpmv.serving.limits import Limits
from minicpmv.serving.log import JsonLines


CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine(nano):
    with nano_engine(nano) as engine:
        yield engine


@pytest.fixture(scope="module")
def http(engine):
    return client_of(build_app(engine))


@pytest.fixture(scope="module")
def ask(http):
    """A function (body) -> the answer."""

    def ask(body):
        response = http("POST", CHAT, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return ask


def chunks_of(response):
    """The events of a stream, without the last."""
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events) and events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refused(response, status, *parts):
    """The error of a response, in the form of OpenAI's API."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert all(part in error["message"] for part in parts), error["message"]
    return error


# ---- answers ----


def test_an_answer_and_its_chunks_are_those_of_openai(ask, http):
    ChatCompletion.model_validate(ask(body_of(NUMBER, QUESTION, logprobs=True, top_logprobs=2)), strict=True)
    response = http("POST", CHAT, json=body_of(NUMBER, QUESTION, stream=True, logprobs=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    for chunk in chunks_of(response):
        ChatCompletionChunk.model_validate(chunk, strict=True)


@pytest.mark.parametrize(
    "options", [{}, THINK | {"max_tokens": 64}, {"enable_thinking": "auto"}, {"n": 2, "temperature": 1.5, "seed": 1}]
)
def test_a_stream_holds_the_same_as_the_whole(ask, http, options):
    body = body_of(NUMBER, QUESTION, **options)
    whole, said = ask(body), {}
    chunks = chunks_of(http("POST", CHAT, json=body | {"stream": True}))
    for chunk in chunks:
        (choice,) = chunk["choices"]
        mine = said.setdefault(choice["index"], {"content": "", "reasoning_content": "", "finish_reason": None})
        for name in ("content", "reasoning_content"):
            mine[name] += choice["delta"].get(name) or ""
        mine["finish_reason"] = choice["finish_reason"] or mine["finish_reason"]
        assert "usage" not in chunk
    for choice in whole["choices"]:
        message = choice["message"]
        assert said[choice["index"]] == {
            "content": message["content"],
            "reasoning_content": message.get("reasoning_content", ""),
            "finish_reason": choice["finish_reason"],
        }
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for(ask, http):
    body = body_of("Hello")
    chunks = chunks_of(http("POST", CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    usage, expected = chunks[-1]["usage"], ask(body)["usage"]
    assert [usage[name] for name in ("prompt_tokens", "completion_tokens")] == [
        expected[name] for name in ("prompt_tokens", "completion_tokens")
    ]


def test_a_call_is_streamed_as_one(http):
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "maxProperties": 0}}}]
    body = body_of("Hello", tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=80, stream=True)
    chunks = chunks_of(http("POST", CHAT, json=body))
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        (0, "now", "{}")
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_text_can_be_gone_on_with(http):
    body = {"model": "nano", "prompt": "What is 1+1?", "max_tokens": 5, "temperature": 0, **ENDLESS}
    answer = http("POST", "/v1/completions", json=body).json()
    assert answer["object"] == "text_completion" and answer["usage"]["completion_tokens"] == 5
    chunks = chunks_of(http("POST", "/v1/completions", json=body | {"stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["choices"][0]["text"]
    typed = http("POST", "/v1/completions", json=body | {"prompt": "<|im_end|>"}).json()
    assert typed["usage"]["prompt_tokens"] > 5
    refused(http("POST", "/v1/completions", json={"prompt": ""}), 400, "empty")


def test_images_of_clients_that_escape_slashes_are_taken(http):
    large = io.BytesIO()
    Image.effect_noise((500, 400), 90).save(large, "PNG")
    body = json.dumps(body_of(data_url(large.getvalue()), "Hello", max_tokens=1)).replace("/", r"\/")
    assert len(body) > 150_000 and http("POST", CHAT, content=body).status_code == 200


def test_models_can_be_listed_and_asked_for(http):
    (card,) = http("GET", "/v1/models").json()["data"]
    assert card["id"] == "nano" and card["max_model_len"] == 4096
    assert http("GET", "/v1/models/nano").json() == card
    assert refused(http("GET", "/v1/models/openbmb/other"), 404, "nano")["code"] == "model_not_found"


def test_what_other_servers_told_a_client_may_come_back(ask):
    assistant = {
        "role": "assistant",
        "content": "47",
        "reasoning_content": "So.",
        "audio": None,
        "refusal": None,
        "x": 1,
    }
    messages = [{"role": "user", "content": "Hi", "name": "me"}, assistant, {"role": "user", "content": "Sure?"}]
    ignored = {"user": "me", "store": True, "metadata": {}, "service_tier": "auto", "parallel_tool_calls": True}
    assert ask({"messages": messages, "max_tokens": 2, "top_k": -1, "stop": [], **ignored})["choices"]
    assert ask({"messages": messages, "max_completion_tokens": 2, "stop": None, "logit_bias": None})["choices"]


# ---- refusals ----


def png(width, height):
    """A small file that claims to be a large image."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def gif(width, height, frames):
    """A small file of many large frames."""
    output = io.BytesIO()
    images = [Image.new("P", (width, height), number % 2) for number in range(frames)]
    images[0].save(output, "GIF", save_all=True, append_images=images[1:], duration=100)
    return output.getvalue()


def video(data):
    return {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4")}}


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
BAD_MEDIA = {
    "no image": (part(data_url(b"Hello")), "not an image"),
    "a program": (part(data_url(EPS)), "not an image"),
    "cut off": (part(data_url(NUMBER.read_bytes()[:900])), "not damaged"),
    "no base64": (part("data:image/png;base64,A"), "data URL"),
    "a bomb": (part(data_url(png(60000, 60000))), "scale it down"),
    "too many pixels": (part(data_url(png(12000, 12000))), "128 megapixels"),
    "an animation of many pixels": (video(gif(3000, 3000, 20)), "128 megapixels"),
    "no video": (video(b"Hello, this is no clip"), "not a video"),
    "a list of other files": (video(PLAYLIST), "not a video"),
    "a cut off video": (video(STAR.read_bytes()[:300]), "cannot be read as a video"),
    "a path": ({"type": "image_url", "image_url": {"url": "/etc/hostname"}}, "data: URL"),
    "a file": ({"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}, "data: URL"),
    "another kind of part": ({"type": "image", "path": "/etc/hostname"}, "image"),
    "sound": ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "neither sound nor files"),
    "a closed port": (part("http://127.0.0.1:1/number.jpg"), "cannot be fetched"),
    "an unknown host": (part("http://nowhere.invalid/number.jpg"), "cannot be fetched"),
    "this machine": (part("http://localhost:1/number.jpg"), "--media-host localhost"),
    "this machine in IPv6": (part("http://[::ffff:127.0.0.1]:1/number.jpg"), "not on the public internet"),
    "the cloud's own address": (part("http://169.254.169.254/latest"), "not on the public internet"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_MEDIA.values(), ids=BAD_MEDIA)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_images_and_videos_are_refused_with_the_reason(http, bad, reason, stream):
    messages = [{"role": "user", "content": [bad, part(QUESTION)]}]
    error = refused(http("POST", CHAT, json={"messages": messages, "stream": stream}), 400, reason)
    assert error["param"].startswith("messages")


def test_pixels_are_counted_over_all_images_of_a_request(http):
    large = io.BytesIO()
    Image.new("1", (7000, 7000)).save(large, "PNG")
    body = {"messages": [{"role": "user", "content": [part(data_url(large.getvalue()))] * 3}]}
    refused(http("POST", CHAT, json=body), 400, "megapixels")


def test_images_that_cannot_fit_into_the_context_are_refused_before_they_are_decoded(http):
    small = part(data_url(png(20, 20)))  # which nothing can decode
    body = {"messages": [{"role": "user", "content": [small] * 200}]}
    assert refused(http("POST", CHAT, json=body), 400, "7200 tokens", "4096")["code"] == "context_length_exceeded"


def message(**fields):
    return {"messages": [{"role": "user", "content": "Hi"} | fields]}


REFUSED = {
    "a prompt beyond the context": (message(content="1 2 " * 5000), "tokens"),
    "too many answers": (body_of("Hi", n=200), "n: "),
    "an unknown field": (body_of("Hi", thinking=True), "thinking"),
    "an unknown variable": (body_of("Hi", chat_template_kwargs={"chat_template": "x"}), "chat_template"),
    "a word for a number": (body_of("Hi", mm_processor_kwargs={"fps": "many"}), "fps"),
    "more slices than the model's": (body_of("Hi", mm_processor_kwargs={"max_slice_nums": 1000}), "at most"),
    "an unknown token": (body_of("Hi", logit_bias={"99999999": 1}), "99999999"),
    "a negative temperature": (body_of("Hi", temperature=-1), "temperature"),
    "an unknown role": (message(role="root"), "role"),
    "no messages": ({"messages": [{}]}, "role"),
    "a message without content": (message(content=None), "no content"),
    "a broken tool call": ({"messages": [{"role": "assistant", "tool_calls": [{"function": 5}]}]}, "function"),
    "nobody who asks": ({"messages": [{"role": "system", "content": "Hi"}]}, "role user"),
    "too many messages": ({"messages": [{"role": "user", "content": "a"}] * 1100}, "messages"),
    "logprobs of nothing": (body_of("Hi", top_logprobs=3), "logprobs"),
    "a schema without its type": (body_of("Hi", response_format={"type": "json_schema"}), "json_schema"),
    "a tool that is not there": (body_of("Hi", tool_choice={"type": "function", "function": {"name": "f"}}), "'f'"),
    "a stop that is no text": (body_of("Hi", stop=[1]), "stop"),
    "a budget beyond the answer's": (body_of("Hi", enable_thinking=True, thinking_budget=-1), "thinking_budget"),
}


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_or_not_well_formed_is_refused(http, body, reason):
    refused(http("POST", CHAT, json=body), 400, reason)


def deep(depth):
    return (
        b'{"messages": [{"role": "user", "content": "a"}], "tools": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
    )


BROKEN = {
    "no JSON": b"{",
    "no object": b"[1]",
    "bad UTF-8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
    "half of a surrogate pair": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "a schema 800 deep": deep(800),
    "a schema 100000 deep": deep(20_000),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_body_that_is_not_json_is_refused(http, content):
    refused(http("POST", CHAT, content=content), 400)


def test_paths_and_methods_that_are_not_there_are_told_as_openai_does(http):
    refused(http("GET", "/nowhere"), 404)
    refused(http("DELETE", "/v1/models"), 405)
    for path in ("/load_model", "/reset", "/v1/responses"):
        refused(http("POST", path, json={}), 404)
    refused(http("POST", CHAT, json=body_of("Hi", model="gpt-4o")), 404, "gpt-4o", "nano")


def test_a_failure_is_told_without_what_it_was(http, engine, monkeypatch):
    def fail(*arguments):
        raise KeyError("a secret")

    monkeypatch.setattr(engine.processor, "apply_chat_template", fail)
    error = refused(http("POST", CHAT, json=body_of("Hi")), 500)
    assert error["type"] == "server_error" and "secret" not in error["message"]


def no_memory(*arguments, **options):
    raise MemoryError


def unknown_image():
    return part(data_url(NUMBER.read_bytes() + os.urandom(8)))


def unknown_video():
    return video(STAR.read_bytes() + b"\0\0\0\x10free" + os.urandom(8))


@pytest.mark.parametrize(
    ("target", "make"),
    [
        ("minicpmv.serving.app.read_request", unknown_image),
        ("minicpmv.serving.media.b64decode", unknown_image),
        ("PIL.Image.open", unknown_image),
        ("PIL.Image.Image.load", unknown_image),
        ("av.open", unknown_video),
    ],
    ids=["a body", "its data URLs", "the header of an image", "an image", "a video"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_memory_is_missing_for_is_told_to_come_back(http, engine, monkeypatch, target, make, stream):
    messages = [{"role": "user", "content": [make(), part(QUESTION)]}]
    body = {"messages": messages, "max_tokens": 1, "stream": stream}
    with monkeypatch.context() as patch:
        patch.setattr(target, no_memory)
        response = http("POST", CHAT, json=body)
    assert refused(response, 503, "memory")["code"] == "overloaded" and int(response.headers["retry-after"]) > 0
    assert http("POST", CHAT, json=body).status_code == 200 and engine.bytes.taken == 0


# ---- limits ----


def test_a_body_larger_than_the_limit_is_refused_before_it_is_read(http):
    refused(http("POST", CHAT, content=b" " * 5_000_000), 413, "4000000")

    async def pieces():
        for _ in range(50):
            yield b" " * 100_000

    refused(http("POST", CHAT, content=pieces()), 413)


@pytest.mark.parametrize(
    "content",
    [
        b'{"messages": [{"role": "user", "content": "' + b"a" * 3_000_000 + b'"}]}',
        b'{"messages": [{"role": "user", "content": "data:' + b"a" * 3_000_000 + b'"}]}',
        b'{"messages": [' + b",".join([b'{"role": "user", "content": "a"}'] * 60_000) + b"]}",
        b'{"messages": [' + b"0," * 1_500_000 + b"0]}",
    ],
    ids=["one text", "a text like a data URL", "many messages", "many numbers"],
)
def test_much_text_is_refused_before_the_work(http, content):
    start = time.process_time()
    error = refused(http("POST", CHAT, content=content), 400, "bytes besides images and videos")
    assert error["code"] == "context_length_exceeded"
    assert time.process_time() - start < 2


def test_requests_beyond_those_that_fit_are_told_when_to_come_back(nano):
    from minicpmv.serving.engine import LocalEngine

    limits = Limits(requests=1, total_megabytes=0.2)
    with LocalEngine(*nano, "nano", limits=limits) as engine:
        http = client_of(build_app(engine))
        error = refused(http("POST", CHAT, content=b" " * 250_000), 503, "busy")
        assert error["type"] == "server_error"
        with engine._requests.taking(1):
            response = http("POST", CHAT, json=body_of("Hello"))
            refused(response, 503, "busy")
            assert int(response.headers["retry-after"]) > 0
        assert http("POST", CHAT, json=body_of("Hello")).status_code == 200  # and what was taken was given back
        assert engine.bytes.taken == 0


# ---- who may ask ----


def test_a_key_is_asked_for_where_there_is_one(engine):
    http = client_of(build_app(engine, api_keys=["secret", "other"]))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
        response = http("GET", "/v1/models", headers=headers)
        assert refused(response, 401)["code"] == "invalid_api_key" and "www-authenticate" in response.headers
    for key in ("secret", "other"):
        assert http("GET", "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/health", "/metrics"):
        assert http("GET", path).status_code == 200


def test_pages_of_other_hosts_may_not_ask_unless_they_are_named(engine):
    closed, opened = (client_of(build_app(engine, cors_origins=origins)) for origins in ((), ("https://example.org",)))
    page = {"origin": "https://example.org"}
    refused(closed("POST", CHAT, json=body_of("Hi"), headers=page), 403, "--cors-origin")
    assert closed("GET", "/v1/models", headers={"origin": "http://localhost"}).status_code == 200
    response = opened("GET", "/v1/models", headers=page)
    assert response.headers["access-control-allow-origin"] == page["origin"]
    preflight = page | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert opened("OPTIONS", CHAT, headers=preflight).status_code == 200
    refused(opened("GET", "/v1/models", headers={"origin": "null"}), 403)


def test_a_name_that_was_pointed_to_this_machine_is_refused(engine):
    http = client_of(build_app(engine, allowed_hosts=frozenset({"localhost", "::1"})))
    refused(http("GET", "/v1/models", headers={"host": "evil.example:8000"}), 403, "--allowed-host")
    for host in ("localhost", "localhost:8000", "[::1]:8000"):
        assert http("GET", "/v1/models", headers={"host": host}).status_code == 200


# ---- what is noted ----


@pytest.mark.parametrize("given", ["abc-123_x.y", "a b", "a\x7fb", "x" * 200, ""])
def test_a_request_id_comes_back_where_it_is_harmless(http, given):
    found = http("GET", "/health", headers={"x-request-id": given}).headers["x-request-id"]
    assert found == given if given == "abc-123_x.y" else found != given and found.isalnum()


def test_counts_can_be_read_by_prometheus(http):
    http("POST", CHAT, json=body_of("Hello"))
    text = http("GET", "/metrics").text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(counts['minicpmv_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    assert float(counts["minicpmv_generated_tokens_total"]) > 0
    assert float(counts["minicpmv_requests_waiting"]) == float(counts["minicpmv_requests_running"]) == 0
    assert float(counts["minicpmv_time_to_first_token_seconds_count"]) >= 1
    assert not any("nowhere" in name for name in counts)


def test_the_routes_are_described(http):
    schemas = http("GET", "/openapi.json").json()["components"]["schemas"]
    assert "messages" in schemas["ChatRequest"]["properties"] and "ImagePart" in schemas
    assert http("GET", "/docs").status_code == 200


def test_whatever_a_client_sends_a_record_of_the_log_is_one_line_of_ascii(caplog, http):
    with caplog.at_level(logging.INFO, logger="minicpmv.serving"):
        http("GET", "/v1/models/%0a%7b%22level%22%3a%22error%22%7d%1b%5b31m%c2%9b%7f%e2%80%a8x")
    record = caplog.records[-1]
    line = JsonLines().format(record)
    assert line.isascii() and line.isprintable()
    assert json.loads(line)["status"] == 404 and json.loads(line)["level"] == "info"
