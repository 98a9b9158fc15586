"""Parts of a model in other software as modules of PyTorch: they stand where the model's own tower, resampler and language
model stand.

So everything above them stays as it is: prompts, packed videos, slices, sampling, thoughts, streams, sessions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from minicpmv.errors import MiniCPMVError
from minicpmv.runtimes.language_model import Reader, RememberingForCausalLM


class Parts(Protocol):
    """Tower, resampler and embeddings in other software."""

    versions: dict[str, str]  # of the software, by name

    @property
    def error(self) -> type[MiniCPMVError]:
        """The software's own."""

    def files(self) -> list[Path]:
        """What holds the weights."""

    def tower(self, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A slice [3, P, P * patches] of (rows, columns) patches to float32 [patches, D']."""

    def resample(self, states: np.ndarray, size: tuple[int, int], temporal_ids: Sequence[int]) -> np.ndarray:
        """States of a unit [frames, patches, D'] to features float32 [Q, D]."""

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n] to float32 [n, D]."""


class PartTower(nn.Module):
    """In place of the tower."""

    def __init__(self, parts: Parts):
        super().__init__()
        self._parts = parts

    def forward(
        self,
        pixel_values: Sequence[Tensor],
        tgt_sizes: Sequence[tuple[int, int]],
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """Strips [3, P, P * patches] to states [all patches, D']."""
        if output_attentions or output_hidden_states:
            raise self._parts.error(
                "an exported tower gives its last states alone: for others and attentions load the checkpoint itself"
            )
        states = [
            self._parts.tower(pixels.float().cpu().numpy(), size)
            for pixels, size in zip(pixel_values, tgt_sizes, strict=True)
        ]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(np.concatenate(states)))


class PartResampler(nn.Module):
    """In place of the resampler."""

    def __init__(self, parts: Parts):
        super().__init__()
        self._parts = parts

    def forward(
        self, hidden_states: Tensor, tgt_sizes: Sequence[tuple[int, int]], temporal_ids: Sequence[Sequence[int]]
    ) -> Tensor:
        """States [all patches, D'] to features [units, Q, D]."""
        states = iter(hidden_states.split([rows * columns for rows, columns in tgt_sizes]))
        sizes, features = iter(tgt_sizes), []
        for ids in temporal_ids:
            frames = torch.stack([next(states) for _ in ids]).numpy()
            size, *_ = [next(sizes) for _ in ids]
            features.append(self._parts.resample(frames, size, list(ids)))
        return torch.from_numpy(np.stack(features))


class PartEmbedding(nn.Module):
    """In place of the embeddings."""

    def __init__(self, parts: Parts):
        super().__init__()
        self._parts = parts
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # by which a model tells device and type

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> float32 [..., D]."""
        return torch.from_numpy(self._parts.embed(ids.reshape(-1).cpu().numpy())).view(*ids.shape, -1)


class PartForCausalLM(RememberingForCausalLM):
    """The language model."""

    def __init__(self, parts: Parts, reader: Reader, config: Any):
        super().__init__(reader, PartEmbedding(parts), config, parts.versions)
        self._parts = parts

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # The files' own bytes, which tell one model from another.
        for file in self._parts.files():
            # "c": the arrays count as writable, which torch wants to be sure of; nothing is written.
            destination[f"{prefix}{file.name}"] = torch.from_numpy(np.memmap(file, np.uint8, "c"))
