"""The one loader: model and processor of a folder, an export or a Hub repository, under one rule of trust."""

from pathlib import Path
from typing import Any

from minicpmv.errors import MiniCPMVError, require
from minicpmv.files import read_json


PUBLISHED = "openbmb/MiniCPM-V-4_5"
WEIGHTS = ("*.safetensors", "*.bin")
# What runs the quantized checkpoints that this package writes: method in their configuration -> extra, package.
QUANTIZED = {
    "bitsandbytes": ("quantize", "bitsandbytes"),
    "compressed-tensors": ("quantize", "compressed_tensors"),
    "torchao": ("torchao", "torchao"),
}


class CheckpointError(MiniCPMVError):
    """The model cannot be loaded: the message says why and what to do."""


def source_of(
    name: str | Path, revision: str | None = None, trust_remote_code: bool = False, needs_code: bool = True
) -> dict[str, Any]:
    """Where a model is, as keywords of any `from_pretrained`: `AutoModel.from_pretrained(**source_of(name))`.

    The code in a folder is trusted, since the user named the folder, and its path becomes absolute, since adapters save it.
    The code of a Hub repository needs `trust_remote_code`.

    Args:
        needs_code: False where the model may also be one that transformers itself knows. transformers then refuses those
            that bring code without `trust_remote_code`.

    Raises:
        CheckpointError: `name` is not a folder, and its code is not trusted; or it is one, and a revision is given.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{name} is a folder, which has no revision {revision!r}: leave it out")
        return {"pretrained_model_name_or_path": str(folder.resolve()), "trust_remote_code": True}
    if needs_code and not trust_remote_code:
        raise CheckpointError(
            f"{name} is not a folder here. A Hub repository brings its own code, which runs when it is loaded: read it, pin "
            "it with a revision (--revision), and trust it (--trust-remote-code)."
        )
    return {
        "pretrained_model_name_or_path": str(name),
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: Any = "auto",
    device_map: Any = "auto",
    quantization_config: Any = None,
) -> tuple[Any, Any]:
    """`(model, processor)` of a model folder, an export or a Hub repository, ready to answer.

    Args:
        name: a folder; a GGUF file, whose language model then runs in llama.cpp; the folder of an export, which runs in ONNX
            Runtime, OpenVINO, ExecuTorch or MLX; or the name of a Hub repository, whose code needs `trust_remote_code`.
        revision: commit, tag or branch of a Hub repository.
        dtype: `torch.dtype` or its name; "auto" is the checkpoint's.
        device_map: as in transformers; "auto" is the accelerator if there is one, else the CPU.
        quantization_config: as in transformers; that of a quantized checkpoint is in its folder.

    Raises:
        CheckpointError: it cannot be loaded, its code is not trusted, or it is a model of another kind.
    """
    check_name(name, revision, trust_remote_code)
    if (place := exported(name)) is not None:
        return _load_exported(place, dtype, device_map, quantization_config)
    source = source_of(name, revision, trust_remote_code)

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoProcessor

    if device_map == "auto" and not (torch.cuda.is_available() or torch.accelerator.is_available()):
        device_map = None  # the CPU needs no plan, and so not the second that importing accelerate takes
    settings = {"dtype": dtype, "device_map": device_map}
    if quantization_config is not None:  # None would hide the one in a checkpoint
        settings["quantization_config"] = quantization_config
    try:
        model = AutoModel.from_pretrained(**source, **settings).eval()
        processor = AutoProcessor.from_pretrained(**source)
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # ImportError: of what a quantized one needs
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name} cannot be loaded: {reason} Give another model, or get the published weights with minicpmv fetch."
        ) from error
    if not hasattr(model, "chat") or not hasattr(processor, "split_thought"):
        raise CheckpointError(
            f"{name} is a {type(model).__name__}, which cannot chat: give a MiniCPM-V 4.5 with this repository's code."
        )
    return model, processor


def attend_without_plans() -> None:
    """Take cuDNN's attention out of torch's kernels, for this whole process: of commands alone, whose process is theirs.

    On Hopper torch 2.11 prefers it, and it plans anew for every shape. Images, prompts and batches have a new one nearly every time.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def exported(name: str | Path) -> Path | None:
    """What a name means that other software than PyTorch runs: a GGUF file, which is the name itself or the only language
    model in a folder without other weights; or the folder of another export; else None.

    Raises:
        CheckpointError: the name is that of a GGUF file which is not there.
        GGUFError: it is the file of a tower, or the folder holds several language models.
    """
    from minicpmv.runtimes.gguf import SUFFIX, find_language_model
    from minicpmv.runtimes.load import EXPORTED_WEIGHTS, is_export

    place = Path(name).expanduser()
    if place.suffix == SUFFIX and not place.exists():
        raise CheckpointError(f"{name}: no such file; minicpmv export gguf writes one from a checkpoint")
    if place.is_file():
        return find_language_model(place) if place.suffix == SUFFIX else None
    weights = (file.stem for pattern in WEIGHTS for file in place.glob(pattern))
    if not place.is_dir() or any(name not in EXPORTED_WEIGHTS for name in weights):
        return None
    return place if is_export(place) else find_language_model(place)


def gguf_file(name: str | Path) -> Path | None:
    """The GGUF file that a name means, as `exported`; None where it means anything else."""
    place = exported(name)
    return place if place is not None and place.is_file() else None


def _load_exported(place: Path, dtype: Any, device_map: Any, quantization_config: Any) -> tuple[Any, Any]:
    from minicpmv.runtimes.load import load as load_exported

    if quantization_config is not None:
        raise CheckpointError(
            f"{place} is quantized as it is: leave out the quantization_config, or load the checkpoint"
        )
    import torch

    device = device_map[""] if isinstance(device_map, dict) else None
    if device_map == "auto" and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    return load_exported(place, dtype, device)


def check_name(name: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Refuse what cannot be loaded before the seconds that importing transformers takes.

    Raises:
        CheckpointError: as `source_of`; or the folder holds no config.json or no weights.
        GGUFError, GraphError, ExecuTorchError, MLXError: an export lacks a file that belongs to it.
        MissingPackageError: the software that runs it is not installed.
    """
    if (place := exported(name)) is not None:
        from minicpmv.runtimes.load import check

        if revision is not None:
            raise CheckpointError(f"{name} is an export, which has no revision {revision!r}: leave it out")
        return check(place)
    folder = Path(source_of(name, revision, trust_remote_code)["pretrained_model_name_or_path"])
    if not folder.is_dir():
        return
    has_config = (folder / "config.json").is_file()
    if not has_config or not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        where = "this folder" if str(name) == "." else name
        raise CheckpointError(
            f"{where} holds no model ({'no weights' if has_config else 'no config.json'}). Name one with -m, such as -m nano "
            f"in a clone of the repository, or get the weights of {PUBLISHED} into the clone with minicpmv fetch."
        )
    method = (read_json(folder / "config.json").get("quantization_config") or {}).get("quant_method")
    if method in QUANTIZED:
        require(*QUANTIZED[method])
