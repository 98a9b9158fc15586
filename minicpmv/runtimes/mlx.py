"""A model in MLX, the library for Macs: slices, units, tokens and rows of embeddings in, features and logits out."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpmv.errors import MiniCPMVError


if TYPE_CHECKING:
    from minicpmv.runtimes.language_model import Part

EXTRA, PACKAGE = "mlx", "mlx"
FILE = "mlx_model.safetensors"
MOST_TOKENS = 512  # that are read in one call
SMALL_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json")


class MLXError(MiniCPMVError):
    """A model cannot be used: the message says why and what to do."""


ERROR = MLXError


def open_parts(folder: Path, config: Any) -> "tuple[MLXParts, MLXReader]":
    """What a folder holds.

    Raises:
        MLXError: the file is damaged, or that of another model.
    """
    import mlx.core as mx
    from mlx import nn

    from minicpmv.runtimes.mlx_model import Model

    file = folder / FILE
    try:
        weights, figures = mx.load(str(file), return_metadata=True)
        heads, base, longest, group = (
            float(figures[name]) for name in ("resampler_heads", "rope_theta", "longest_side", "group")
        )
        model = Model(config, int(heads), base, int(longest))

        def stored(path: str, module: Any) -> bool | dict[str, int]:
            """How a matrix is stored: integers stand in words of 32 bits beside their scales."""
            if (scales := weights.get(f"{path}.scales")) is None:
                return False
            values = scales.shape[-1] * int(group)
            return {"group_size": int(group), "bits": weights[f"{path}.weight"].shape[-1] * 32 // values}

        nn.quantize(model, class_predicate=stored)
        if mx.default_device() == mx.Device(mx.cpu):  # whose 16-bit floats are slow, and lose what answers depend on
            weights = {
                name: value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
                for name, value in weights.items()
            }
        model.load_weights(list(weights.items()))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MLXError(f"{file} does not fit its config.json ({reason}): export the checkpoint again") from error
    return MLXParts(file, model), MLXReader(file, model)


class MLXParts:
    """Tower, resampler and embeddings."""

    error = MLXError

    def __init__(self, file: Path, model: Any):
        self.file, self.versions, self._model = file, {PACKAGE: version(PACKAGE)}, model

    def files(self) -> list[Path]:
        """What holds the weights."""
        return [self.file]

    def tower(self, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A slice [3, P, P * patches] of (rows, columns) patches to float32 [patches, D']."""
        longest = self._model.vpm.buckets.shape[1]
        if max(size) > longest:
            raise MLXError(f"{self.file} cannot read {size} patches: its positions end at {longest} a side")
        return _array(self._model.vpm(_from(pixels), size))

    def resample(self, states: np.ndarray, size: tuple[int, int], temporal_ids: Sequence[int]) -> np.ndarray:
        """States of a unit [frames, patches, D'] to features float32 [Q, D]."""
        dtype = self._model.resampler.query.dtype
        return _array(self._model.resampler(_from(states).astype(dtype), size, list(temporal_ids)))

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n] to float32 [n, D]."""
        return _array(self._model.llm.embed_tokens(_from(ids)))


class MLXReader:
    """The language model, with the states of several conversations."""

    software, error = "MLX", MLXError
    most_sequences = 256

    def __init__(self, file: Path, model: Any):
        self.name, self._model = file.name, model
        self.sequences = self.cells = 0
        self._caches: list[list[Any]] = []

    def reserve(self, sequences: int, cells: int) -> None:
        """Make room for so many conversations, which grow as they need."""
        from minicpmv.runtimes.mlx_model import Cache

        self._caches = [[Cache() for _ in self._model.llm.layers] for _ in range(sequences)]
        self.sequences, self.cells = sequences, cells

    def read(self, parts: "Sequence[Part]") -> list[np.ndarray]:
        """Read the parts; returns the logits [wanted, V] of each."""
        return [np.concatenate([*self._read(part)]) for part in parts]

    def _read(self, part: "Part") -> Any:
        caches = self._caches[part.sequence]
        for cache in caches:
            cache.length = part.start
        dtype = self._model.llm.norm.weight.dtype
        for begin in range(0, len(part.rows), MOST_TOKENS):
            rows, wanted = (column[begin : begin + MOST_TOKENS] for column in (part.rows, part.wanted))
            yield _array(self._model.llm(_from(rows).astype(dtype), caches, _from(np.flatnonzero(wanted))))


def _from(values: np.ndarray) -> Any:
    import mlx.core as mx

    return mx.array(values)


def _array(value: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(value.astype(mx.float32))
