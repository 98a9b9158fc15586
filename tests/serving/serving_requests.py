"""What the tests of the server ask with."""

import base64
import contextlib
import re
import threading
from pathlib import Path

import anyio
import httpx
import uvicorn
from conftest import GREEDY, REPOSITORY

from minicpmv.serving.engine import LocalEngine
from minicpmv.serving.limits import Limits


ASSETS = REPOSITORY / "assets"
NUMBER, SHAPES, STAR = (ASSETS / name for name in ("number.jpg", "shapes.jpg", "star.mp4"))
QUESTION = "What does it say?"
SUM = "A star costs 3 and a circle costs 2. What do a star and a circle cost?"
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
ENDLESS = {"logit_bias": {"887": -100, "889": -100}}  # <|endoftext|> and <|im_end|> of nano: only a limit ends it


def data_url(source, mime="image/jpeg"):
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def part(source):
    """A part of a message: text, an address, or the data URL of a file."""
    if isinstance(source, Path):
        kind = "video_url" if source.suffix == ".mp4" else "image_url"
        return {"type": kind, kind: {"url": data_url(source)}}
    if re.match("http|data:", source):
        return {"type": "image_url", "image_url": {"url": source}}
    return {"type": "text", "text": source}


def body_of(*content, **options):
    """A request for the likeliest answer to one question."""
    messages = [{"role": "user", "content": [part(source) for source in content]}]
    return {"messages": messages, "temperature": 0, "max_tokens": 32} | options


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


def chat(nano, *content, **options):
    """What `model.chat` answers to the same."""
    model, processor = nano
    messages = options.pop("messages", None) or [{"role": "user", "content": list(content)}]
    return model.chat(
        msgs=messages, processor=processor, return_dict=True, **GREEDY | {"max_new_tokens": 32} | options
    )


def nano_engine(nano):
    """Its requests may have 4 MB and fetch from this machine."""
    return LocalEngine(*nano, "nano", limits=Limits(megabytes=4, hosts=frozenset({"127.0.0.1"})))


def client_of(app):
    """A function (method, path, ...) -> response."""

    def request(method, path, **options):
        async def ask():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, **options)

        return anyio.run(ask)

    return request


@contextlib.contextmanager
def served(app):
    """The address of a server of `app` in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
