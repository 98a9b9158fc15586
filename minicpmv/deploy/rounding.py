"""Weights rounded to the nearest of 16 or 256 integers, in the format of compressed-tensors.

What is special:
- Tensor after tensor goes from the checkpoint into the file: the memory is that of the largest.
- How numbers are rounded and packed is the library's own code; what is here is the order of the work.
"""

import json
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from tqdm import tqdm

from minicpmv.deploy.source import Checkpoint


FORMATS = {"w8a8": "int-quantized", "w4a16": "pack-quantized"}
# Types in the header of a file of safetensors.
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32"}
TYPES |= {torch.int64: "I64"}
ALIGNMENT = 8  # bytes to which a header is filled up


def scheme_of(method: str, group_size: int) -> QuantizationScheme:
    """How the library describes a method; `group_size` is for 4 bits."""
    scheme = preset_name_to_scheme(method.upper(), ["Linear"])
    if method == "w4a16":
        scheme.weights.group_size = group_size
    scheme.format = FORMATS[method]
    return scheme


def config_of(scheme: QuantizationScheme, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format, ignore=ignore, quantization_status="compressed"
    )
    return config.model_dump(mode="json", exclude_none=True)


def rounded(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """A weight [out, in] as the tensors that stand for it: scales, and integers, packed if they have 4 bits."""
    groups = weight.unflatten(-1, (-1, scheme.weights.group_size or weight.shape[-1])).float()  # [out, groups, G]
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    parts = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero_point}
    return BaseCompressor.get_value_from_registry(scheme.format).compress(parts, scheme)


def write(checkpoint: Checkpoint, layers: Iterable[str], scheme: QuantizationScheme, file: Path) -> None:
    """Write all tensors of a checkpoint, the weights of `layers` rounded."""
    weights = {f"{layer}.weight" for layer in layers}
    names = sorted(checkpoint.files)

    def parts_of(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name not in weights:
            return {name: tensor}
        layer = name.removesuffix("weight")
        return {layer + part: value for part, value in rounded(tensor, scheme).items()}

    def tensors() -> Iterator[torch.Tensor]:
        for name in tqdm(names, desc=file.name, disable=not sys.stderr.isatty()):
            yield from parts_of(name, checkpoint.stored(name)).values()

    # The header comes first, and so from tensors without numbers.
    infos: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in names:
        empty = torch.empty(checkpoint.shape(name), dtype=checkpoint.dtype(name), device="meta")
        infos |= {part: (value.dtype, tuple(value.shape)) for part, value in parts_of(name, empty).items()}
    write_safetensors(file, infos, tensors())


def write_safetensors(
    file: Path, infos: dict[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[torch.Tensor]
) -> None:
    """Write a file of safetensors tensor by tensor, in the order of `infos`.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape) in infos.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            out.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
