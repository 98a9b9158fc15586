"""Quantizes a checkpoint: in, a folder of whole weights; out, a folder that loads as any other, of a third to a half the
size.

What is special:
- The language model is quantized. Tower, resampler and head stay whole unless asked for; `resampler.attn.out_proj` always
  does, since no loader takes it for a linear layer and all quantize it.
- The folder gets its name when it is whole, and answers as PyTorch does from whole weights.
- Only `gptq` and `awq` need conversations, and llm-compressor, which has an environment of its own.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minicpmv.checkpoint import load
from minicpmv.deploy.folder import check_new, whole_folder, write_card
from minicpmv.deploy.reference import Reference, open_runtime
from minicpmv.deploy.source import Checkpoint
from minicpmv.errors import MiniCPMVError, require
from minicpmv.files import write_whole


EXTRA = "quantize"
PARTS = ("vpm", "resampler", "lm_head")  # that stay whole unless asked for
NEVER = "resampler.attn.out_proj"
GROUP_SIZES = (32, 64, 128, 256)  # of 4-bit integers that share a scale
DEFAULT_GROUP = 128
SMALL = 64  # width of a layer that shows whether a method runs here
# How integers are chosen, and for which methods.
ALGORITHMS = {"nearest": None, "gptq": ("w8a8", "w4a16"), "awq": ("w4a16",)}


class QuantizeError(MiniCPMVError):
    """A checkpoint cannot be quantized in this way: the message says why and what to do."""


@dataclass(frozen=True)
class Method:
    """How weights are stored.

    `margin` is what that may cost: where an answer differs from PyTorch's, PyTorch must have preferred its own token by no
    more nats than this. `feature_margin` is the relative error of image features where the tower is quantized too.
    """

    package: str
    bits: int
    margin: float
    feature_margin: float
    about: str


METHODS = {
    "nf4": Method("bitsandbytes", 4, 2, 0.3, "4-bit normal floats of bitsandbytes, whose scales are quantized too"),
    "int8": Method("bitsandbytes", 8, 0.5, 0.1, "8-bit integers of bitsandbytes (LLM.int8)"),
    "torchao-int8": Method("torchao", 8, 0.5, 0.1, "8-bit integers of torchao"),
    "torchao-8da8w": Method("torchao", 8, 0.5, 0.1, "8-bit integers of torchao, which rounds activations too"),
    "w8a8": Method("compressed_tensors", 8, 0.5, 0.1, "8-bit integers of compressed-tensors, activations too in vLLM"),
    "w4a16": Method("compressed_tensors", 4, 2, 0.3, "4-bit integers of compressed-tensors"),
}
WHOLE_FEATURE_MARGIN = 1e-3  # of a tower that stays whole

USE = """\
```text
minicpmv ask IMAGE "What is in the image?" -m {folder}
minicpmv chat -m {folder}
```

loads it, as does `AutoModel.from_pretrained(folder, trust_remote_code=True)`, with {package} installed."""


def quantize(
    model: str | Path,
    output: Path,
    method: str,
    *,
    group_size: int | None = None,
    algorithm: str = "nearest",
    also: Sequence[str] = (),
    data: str | None = None,
    conversations: int = 48,
    samples: int = 10,
    is_checked: bool = True,
    note: Callable[[str], None] = lambda what: None,
) -> Path:
    """Quantize a checkpoint and hold it against PyTorch.

    Args:
        model: folder of the checkpoint.
        output: the new folder.
        method: of `METHODS`.
        group_size: weights that share a scale, for w4a16.
        algorithm: of `ALGORITHMS`: to the nearest integer, or so that conversations change least.
        also: parts of `PARTS` that are quantized too.
        data: conversations for that, as [`minicpmv.data.load.load_conversations`] reads them; None: drawn ones, with images
            and packed videos.
        conversations: how many of them.
        samples: questions of each row of NanoBench.
        is_checked: False leaves out the comparison, where there is no memory for the whole checkpoint.
        note: is told what happens.

    Returns:
        the folder.

    Raises:
        CheckpointError, DataError, ExportError, QuantizeError, OutputError, MissingPackageError: before anything is written.
        ParityError: the answers differ beyond what the method allows; the files stay in a folder whose name says so.
    """
    kind, output = METHODS[method], Path(output).expanduser()
    group_size = check(method, group_size, algorithm, also, data)
    checkpoint = Checkpoint(model)
    dtype = computing_type(checkpoint)
    check_machine(method, dtype)
    layers = linear_layers(checkpoint, also)
    if method == "w4a16":
        check_groups(layers, group_size)
    check_new(output, quantized_bytes(checkpoint, layers, kind.bits))
    rows, about = [], kind.about
    if algorithm != "nearest":
        from minicpmv.data.load import some_conversations

        rows = some_conversations(data, conversations)
        about += f", chosen by {algorithm} over {len(rows)} conversations ({Path(data).name if data else 'drawn'})"
    name = "-".join([checkpoint.folder.name, method, *([algorithm] if algorithm != "nearest" else [])])
    with whole_folder(output) as stage:
        note(f"Quantizing {len(layers)} layers of {checkpoint.folder.name}")
        if kind.package == "compressed_tensors":
            from minicpmv.deploy import rounding

            scheme, ignore = rounding.scheme_of(method, group_size), patterns(whole(also))
            if rows:
                os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # else it tells of every layer
                from minicpmv.deploy.calibrate import calibrate

                settings = calibrate(checkpoint, stage, algorithm, scheme, ignore, rows, note)
            else:
                rounding.write(checkpoint, layers, scheme, stage / "model.safetensors")
                settings = rounding.config_of(scheme, ignore)
        else:
            settings = write_with_transformers(checkpoint, stage, method, dtype, whole(also))
        finish(checkpoint, stage, settings)
        if is_checked:
            _compare(checkpoint, stage, name, method, about, also, samples, note)
        _write_card(stage, checkpoint, name, output, kind.package, about)
    return output


def check(method: str, group_size: int | None, algorithm: str, also: Sequence[str], data: str | None = None) -> int:
    """Refuse settings that do not go together, and packages that lack. Returns the group size.

    Raises:
        QuantizeError, MissingPackageError: names them.
    """
    if method != "w4a16" and group_size is not None:
        raise QuantizeError(f"{method} has no groups: leave --group-size out, or take w4a16")
    if (methods := ALGORITHMS[algorithm]) and method not in methods:
        raise QuantizeError(f"{algorithm} does not know {method}: leave it out, or take {' or '.join(methods)}")
    if data is not None and methods is None:
        raise QuantizeError(
            f"{data} was given, but {algorithm} looks at no conversations: leave it out, or take gptq or awq"
        )
    if method.startswith("torchao") and "lm_head" in also:
        raise QuantizeError("torchao under transformers keeps lm_head whole: leave it out, or take another method")
    if algorithm == "nearest":
        package = METHODS[method].package
        require("torchao" if package == "torchao" else EXTRA, package)
    else:
        require("calibrate", "llmcompressor")
    return group_size or DEFAULT_GROUP


def linear_layers(checkpoint: Checkpoint, also: Sequence[str]) -> dict[str, int]:
    """`{name: values that it reads}` of the layers that are quantized.

    Raises:
        QuantizeError: the head that is to be quantized is the embeddings, too.
    """
    if "lm_head" in also and checkpoint.is_tied:
        raise QuantizeError("lm_head shares its weights with the embeddings, which stay whole: leave it out")
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    return {
        name: module.in_features
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and not {*name.split(".")} & {*PARTS} - {*also}
    }


def check_groups(layers: dict[str, int], group_size: int) -> None:
    """Refuse a group size that does not divide the rows of a layer.

    Raises:
        QuantizeError: names the layer, and the sizes that divide all.
    """
    name, values = next(((name, count) for name, count in layers.items() if count % group_size), (None, 0))
    if name is None:
        return
    legal = [str(size) for size in GROUP_SIZES if not any(count % size for count in layers.values())]
    remedy = f"choose {' or '.join(legal)}" if legal else f"leave {name.split('.')[0]} whole"
    raise QuantizeError(f"{name} has rows of {values} weights, which groups of {group_size} do not divide: {remedy}")


def quantized_bytes(checkpoint: Checkpoint, layers: dict[str, int], bits: int) -> int:
    """About how many bytes the new weights take, scales included."""
    import math

    quantized = sum(math.prod(checkpoint.shape(f"{layer}.weight")) for layer in layers)
    whole_bytes = sum(
        math.prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize
        for name in checkpoint.files
        if name.removesuffix(".weight") not in layers
    )
    return whole_bytes + quantized * (bits + 1) // 8


def whole(also: Sequence[str]) -> list[str]:
    """Beginnings of the names of what stays whole."""
    return [*(part for part in PARTS if part not in also), *([NEVER] if "resampler" in also else [])]


def patterns(names: Sequence[str]) -> list[str]:
    """Names as compressed-tensors reads them, wherever a loader hangs the parts."""
    return [f"re:.*{name.replace('.', '[.]')}.*" for name in names]


def computing_type(checkpoint: Checkpoint) -> Any:
    """The `torch.dtype` in which the model computes, and not that of the stored weights: bitsandbytes does not turn one
    into the other."""
    import torch

    return getattr(torch, checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16")


def check_machine(method: str, dtype: Any) -> None:
    """Run a small layer as the whole model will: some kernels want a GPU, or a processor that this machine lacks.

    Raises:
        QuantizeError: with what the package says.
    """
    if (package := METHODS[method].package) == "compressed_tensors":
        return  # whole weights are what runs
    import torch
    from torch import nn

    layer: nn.Module = nn.Linear(SMALL, SMALL, dtype=dtype)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        if package == "torchao":
            from torchao.quantization import quantize_

            quantize_(layer.to(device), torchao_config(method))
        else:
            from bitsandbytes.nn import Linear4bit, Linear8bitLt

            weights = layer.state_dict()
            if method == "nf4":
                layer = Linear4bit(SMALL, SMALL, compute_dtype=dtype, quant_type="nf4")
            else:
                layer = Linear8bitLt(SMALL, SMALL, has_fp16_weights=False)
            layer.load_state_dict(weights)
            layer.to(device)
        with torch.inference_mode():
            layer(torch.ones(1, SMALL, dtype=dtype, device=device))
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise QuantizeError(
            f"{method} does not run on this machine ({device}): {package} says: {reason}. Take w8a8 or w4a16, which run anywhere"
        ) from error


def torchao_config(method: str) -> Any:
    """What torchao does in a method."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    kinds = {"torchao-int8": Int8WeightOnlyConfig, "torchao-8da8w": Int8DynamicActivationInt8WeightConfig}
    return kinds[method](version=2)


def write_with_transformers(
    checkpoint: Checkpoint, folder: Path, method: str, dtype: Any, names: list[str]
) -> dict[str, Any]:
    """Load a checkpoint quantized, which goes tensor by tensor, and save it. Returns `quantization_config`."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    config: Any
    if method == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=names,
        )
    elif method == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=names)
    else:
        config = TorchAoConfig(torchao_config(method), modules_to_not_convert=names)
    model, _ = load(checkpoint.folder, dtype=dtype, quantization_config=config)
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def finish(checkpoint: Checkpoint, folder: Path, settings: dict[str, Any]) -> None:
    """Put the checkpoint's small files beside the weights, and `quantization_config` into its configuration."""
    checkpoint.copy_small_files(folder)
    config = checkpoint.config | {"quantization_config": settings}
    write_whole(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


# ---- what is left beside it ----


def _compare(
    checkpoint: Checkpoint,
    stage: Path,
    name: str,
    method: str,
    about: str,
    also: Sequence[str],
    samples: int,
    note: Callable[[str], None],
) -> None:
    """Hold what was written against PyTorch, and write down what was found.

    Raises:
        ParityError: the answers differ too much.
    """
    kind = METHODS[method]
    Reference(checkpoint, samples, note).check(
        stage,
        partial(open_runtime, stage, "torch", "transformers", kind.package),
        name,
        partial(_write_card, stage, checkpoint, name, stage, kind.package, about),
        "choose a method with more bits",
        type=method,
        size=weights_bytes(stage),
        margin=kind.margin,
        feature_margin=kind.feature_margin if {"vpm", "resampler"} & {*also} else WHOLE_FEATURE_MARGIN,
    )


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _write_card(folder: Path, checkpoint: Checkpoint, name: str, output: Path, package: str, about: str) -> None:
    before = weights_bytes(checkpoint.folder) / 1e6
    base = (
        f"`{checkpoint.folder.name}`, a MiniCPM-V 4.5 ({before:,.1f} MB), in {about}, written by `minicpmv quantize`."
    )
    use = USE.format(folder=output.name, package=package.replace("_", "-"))
    write_card(folder, "transformers", name, base, use, [name])
