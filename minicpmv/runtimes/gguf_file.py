"""A GGUF file whose tensors stay on the disk until they are looked at.

What is special:
- The package gguf reads every token of a vocabulary into an object of its own, which takes most of the time of loading a
  model. Here texts in lists are passed over: who needs the tokenizer has it from the checkpoint.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minicpmv.errors import MiniCPMVError, require


MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32  # of tensors, where the head does not say
TEXT, LIST = 8, 9
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
PLAIN = {0: "<f4", 1: "<f2"}  # types of tensors that numpy knows, by ggml's numbers


class GGUFError(MiniCPMVError):
    """A GGUF file cannot be used: the message says why and what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the file."""

    name: str
    kind: int  # ggml's number of its type
    width: int  # values of a row
    data: np.ndarray  # float32 or float16 [...], of other types uint8 [..., bytes of a row]

    def rows(self, places: Any = slice(None)) -> np.ndarray:
        """Some rows, or all, as float32."""
        from gguf import GGMLQuantizationType, quants

        return quants.dequantize(self.data[places], GGMLQuantizationType(self.kind)).astype(np.float32, copy=False)


class GGUFFile:
    """The head and the tensors of a file.

    Attributes:
        fields: values of the head: numbers, texts and lists of numbers.

    Raises:
        GGUFError: it is no whole GGUF file.
        MissingPackageError: the package that knows the types of tensors is not installed.
    """

    def __init__(self, path: Path):
        require("gguf", "gguf")
        self.path = path
        # "c": the arrays count as writable, which torch wants to be sure of; what is written stays in memory.
        data: Any = np.memmap(path, np.uint8, "c") if path.stat().st_size else np.empty(0, np.uint8)
        self._bytes, self._view, self._place = data, memoryview(data), 0
        try:
            self.fields = self._read_head()
            infos = [self._read_info() for _ in range(self._tensor_count)]
            alignment = self.fields.get("general.alignment", ALIGNMENT)
            start = -(-self._place // alignment) * alignment
            self.tensors = {info[0]: self._tensor(*info, start) for info in infos}
        except (struct.error, ArithmeticError, ValueError, LookupError, TypeError) as error:
            raise GGUFError(f"{path} is no whole GGUF file ({error}): export or fetch it again") from error

    def _read_head(self) -> dict[str, Any]:
        if bytes(self._view[:4]) != MAGIC:
            raise ValueError(f"it begins with {bytes(self._view[:4])!r}")
        self._place = 4
        version, self._tensor_count, count = self._number("<I"), self._number("<Q"), self._number("<Q")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}")
        if not self._tensor_count:
            raise ValueError("it has no tensors")
        return {self._text(): self._value(self._number("<I")) for _ in range(count)}

    def _number(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._view, self._place)
        self._place += struct.calcsize(layout)
        return value

    def _text(self) -> str:
        length = self._number("<Q")
        start, self._place = self._place, self._place + length
        if self._place > len(self._view):
            raise ValueError("it ends within a text")
        return str(self._view[start : self._place], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind != LIST:
            return self._array(NUMBERS[kind], 1)[0].item()
        kind, count = self._number("<I"), self._number("<Q")
        if kind != TEXT:
            return self._array(NUMBERS[kind], count).tolist()
        unpack, view, place = struct.Struct("<Q").unpack_from, self._view, self._place
        for _ in range(count):
            place += 8 + unpack(view, place)[0]
        self._place = place
        return None

    def _array(self, layout: str, count: int) -> np.ndarray:
        found = np.frombuffer(self._view, layout, count, self._place)
        self._place += found.nbytes
        return found

    def _read_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("<I")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("<I"), self._number("<Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> StoredTensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        layout = PLAIN.get(kind, "u1")
        stored = shape if kind in PLAIN else tuple(quant_shape_to_byte_shape(shape, GGMLQuantizationType(kind)))
        size = int(np.prod(stored)) * np.dtype(layout).itemsize
        data = self._bytes[start + offset : start + offset + size]
        if len(data) != size:
            raise ValueError(f"it ends within {name}")
        return StoredTensor(name, kind, shape[-1], data.view(layout).reshape(stored))
