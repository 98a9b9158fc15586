"""`minicpmv serve --engine vllm`: vLLM's own server with the plugin, and the options that this model needs.

What is special:
- Nothing stands before vLLM's server: what its clients can do there, they can do here.
- As our own server does, it fetches from no address in the operator's network: it takes data URLs, and what lies on
  `media_hosts`. vLLM itself would fetch from anywhere.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence

from minicpmv.checkpoint import check_name, source_of
from minicpmv.errors import MiniCPMVError


PLUGIN = "minicpmv"
NOWHERE = "none.invalid"  # a host that cannot be: no name is ever given out under .invalid
ANY_HOST = "*"


class EngineError(MiniCPMVError):
    """vLLM cannot serve this: the message says why and what to do."""


def command(
    model: str,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    think: bool = False,
    cors_origins: Sequence[str] = (),
    media_hosts: Sequence[str] = (),
    max_rows: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command that starts vLLM's server.

    Args:
        name: under which clients ask for the model.
        think: whether the model thinks where a request does not say.
        media_hosts: fetch images and videos from these hosts alone; "*" fetches from anywhere, also from addresses in
            the operator's own network.
        max_rows: requests that are answered at once; others wait.
        extra: further options of `vllm serve`, which count over these.

    Raises:
        CheckpointError: the model is neither a folder nor trusted.
    """
    source = source_of(model, revision, trust_remote_code)
    options: dict[str, str | None] = {
        "--served-model-name": name,
        "--host": host,
        "--port": str(port),
        "--trust-remote-code": None,
        "--reasoning-parser": "qwen3",
        "--enable-auto-tool-choice": None,
        "--tool-call-parser": "hermes",
        "--default-chat-template-kwargs": json.dumps({"enable_thinking": think}),
        "--media-io-kwargs": json.dumps({"video": {"video_backend": PLUGIN}}),
        "--trust-request-mm-kwargs": None,  # the plugin checks each of them
    }
    if revision is not None:
        options["--revision"] = revision
    if cors_origins:
        options["--allowed-origins"] = json.dumps(list(cors_origins))
    if max_rows is not None:
        options["--max-num-seqs"] = str(max_rows)
    words = [word for option, value in options.items() for word in (option, value) if word is not None]
    if ANY_HOST not in media_hosts:
        words += ["--allowed-media-domains", *(media_hosts or [NOWHERE])]
    folder = source["pretrained_model_name_or_path"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder, *words, *extra]


def environment(api_keys: Sequence[str], max_megabytes: float, base: Mapping[str, str]) -> dict[str, str]:
    """`base` with what vLLM takes from there: a key on the command line would be seen by all users of the machine."""
    ...


def serve(
    model: str,
    *,
    api_keys: Sequence[str] = (),
    max_megabytes: float = 64,
    max_requests: int | None = None,
    **options,
) -> None: ...
