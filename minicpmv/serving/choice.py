"""Which engine runs a model, where that is left open."""

import importlib.util
from pathlib import Path
from typing import Literal

from minicpmv.errors import MiniCPMVError


Engine = Literal["auto", "transformers", "llama.cpp", "vllm"]
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")  # of NVIDIA, and of AMD


class EngineError(MiniCPMVError):
    """An engine that cannot run what the model is, does not start, or has stopped."""


def choose_engine(engine: Engine, model: str) -> Engine:
    """What runs the model; `"auto"` is llama.cpp for a GGUF file, vLLM where it and a GPU are there, else transformers.

    Raises:
        EngineError: the engine cannot run what the model is.
    """
    from minicpmv.checkpoint import gguf_file

    is_gguf = gguf_file(model) is not None
    if engine == "llama.cpp" and not is_gguf:
        raise EngineError(f"{model} is no GGUF file: minicpmv export gguf writes one that llama.cpp runs")
    if engine in ("transformers", "vllm") and is_gguf:
        raise EngineError(f"{model} is a GGUF file, which llama.cpp runs: leave out --engine, or give the checkpoint")
    if engine != "auto":
        return engine
    if is_gguf:
        return "llama.cpp"
    return "vllm" if has_vllm() else "transformers"


def has_vllm() -> bool:
    """Whether vLLM is installed, and a GPU there for it. torch is not asked: vLLM wants to import it first."""
    return importlib.util.find_spec("vllm") is not None and any(Path(device).exists() for device in GPU_DEVICES)
