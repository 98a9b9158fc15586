"""The types of a GGUF file: what each tensor is stored as, and its bytes.

What is special:
- "K" types are mixes by the rule of llama.cpp's own tool: layers in which an error costs more get more bits.
- Plain types are numpy's work, K types that of ggml's own code in llama.cpp, a block of rows in each thread.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicpmv.errors import MiniCPMVError
from minicpmv.runtimes.llamacpp import quantize as quantize_blocks


VALUES_AT_ONCE = 2**24  # of a tensor that are quantized in one step: 64 MB of float32


class QuantizationError(MiniCPMVError):
    """A tensor cannot be stored in the type that was asked for."""


@dataclass(frozen=True)
class FileType:
    """How a file is stored.

    `margin` is what its rounding may cost: where an answer differs from PyTorch's, PyTorch must have preferred its own
    token by no more nats than this.
    """

    name: str
    number: int  # general.file_type
    base: str  # of most tensors: names of ggml's types
    better: str  # of those where an error costs more
    margin: float

    @property
    def needs_ggml(self) -> bool:
        """Whether a tensor is of a K type, which ggml's own code makes."""
        return self.base.endswith("_K") or self.better.endswith("_K")


# Q8_0 errs by about 0.4 % of a logit, Q4_K_M by several: margins are for logits that spread over some ten nats.
FILE_TYPES = {
    kind.name: kind
    for kind in (
        FileType("f32", 0, "F32", "F32", 0.01),
        FileType("f16", 1, "F16", "F16", 0.05),
        FileType("bf16", 32, "BF16", "BF16", 0.2),
        FileType("q8_0", 7, "Q8_0", "Q8_0", 0.3),
        FileType("q6_k", 18, "Q6_K", "Q6_K", 0.5),
        FileType("q5_k_m", 17, "Q5_K", "Q6_K", 0.8),
        FileType("q4_k_m", 15, "Q4_K", "Q6_K", 1.5),
        FileType("q4_0", 2, "Q4_0", "Q6_K", 1.5),
    )
}


def type_of(name: str, shape: tuple[int, ...], file_type: FileType, layers: int, is_tied: bool) -> str:
    """The ggml type of a tensor of the language model.

    Raises:
        QuantizationError: its rows cannot be divided into blocks of the type.
    """
    if len(shape) == 1:
        return "F32"
    kind = file_type.base
    if name == "output.weight" or (is_tied and name == "token_embd.weight"):
        kind = file_type.better
    elif file_type.name in ("q4_k_m", "q5_k_m") and name.split(".")[-2] in ("attn_v", "ffn_down"):
        kind = file_type.better if gets_more_bits(int(name.split(".")[1]), layers) else kind
    check_blocks(name, shape, kind)
    return kind


def gets_more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is among those that a mix stores better: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def check_blocks(name: str, shape: tuple[int, ...], kind: str) -> None:
    """Refuse rows that blocks do not divide.

    Raises:
        QuantizationError: names the tensor.
    """
    block = block_of(kind)[0]
    if shape[-1] % block:
        raise QuantizationError(
            f"{name} has rows of {shape[-1]} values, which blocks of {block} ({kind}) do not divide: choose another type, "
            "such as f16"
        )


def block_of(kind: str) -> tuple[int, int]:
    """(values, bytes) of a block of a ggml type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    values, size = block_of(kind)
    return int(np.prod(shape)) // values * size


def stored(tensor: np.ndarray, kind: str, threads: int) -> Iterator[np.ndarray]:
    """The bytes of a float32 tensor in a ggml type, some rows at a time."""
    from gguf import GGMLQuantizationType, quants

    number = GGMLQuantizationType[kind]
    if kind == "F32":
        yield np.ascontiguousarray(tensor)
        return
    rows = tensor.reshape(-1, tensor.shape[-1])
    if kind == "F16":
        if np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
            raise QuantizationError("a weight is larger than 65504, the largest number of f16: choose bf16 or f32")
        yield rows.astype(np.float16)
        return
    count = max(1, VALUES_AT_ONCE // rows.shape[1])
    blocks = [rows[start : start + count] for start in range(0, len(rows), count)]
    if not kind.endswith("_K"):
        yield from (quants.quantize(block, number) for block in blocks)
        return
    row_bytes = stored_bytes((1, rows.shape[1]), kind)

    def with_ggml(block: np.ndarray) -> Any:
        # As llama.cpp's tool does it from a file in f16, so that its files and these are the same.
        return quantize_blocks(block.astype(np.float16).astype(np.float32), int(number), row_bytes)

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(blocks), threads):
            yield from pool.map(with_ggml, blocks[start : start + threads])
