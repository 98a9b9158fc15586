"""The 3D resampler of MiniCPM-V 4.5: all patches of one slice, or of up to six frames of a video, to `query_num` tokens.

What is special:
- Learned queries attend once to the patches. Keys carry a 2D sin-cos position and, in a video, the time of their frame;
  values carry neither.
- A unit is what one set of queries reads: a slice, or the slices at one position of a group of frames. Units of unequal
  size run packed, as in the tower.
- Positions are computed for the rows in use. The whole tables would take 80 MB and 1.18 GB and end at 70 patches and
  72,000 tenths of a second; here neither has an end.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from .vision_minicpmv import equal_runs


STILL_IMAGE_ID = -1  # the temporal id of an image that is not part of a video: no time is added


def sincos_positions(positions: Sequence[int] | np.ndarray, dim: int) -> np.ndarray:
    """Sin-cos embedding of `positions` (any numbers [n]) in `dim` channels: float32 array [n, dim], sines first.

    The frequencies are 1 / 10000 ** (i / (dim / 2)). Each is rounded to float32, as are the angles: the checkpoint learned
    with tables that were. Powers and sines are float64 and rounded once, since those of float32 differ between CPUs.
    """
    frequencies = (10000.0 ** -(np.arange(dim // 2) / (dim / 2))).astype(np.float32)
    angles = np.asarray(positions, dtype=np.float32)[:, None] * frequencies  # [n, dim / 2]
    angles = angles.astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


@lru_cache(maxsize=8)
def axis_positions(count: int, dim: int) -> np.ndarray:
    """Sin-cos embedding of 0 .. count - 1, float32 array [count, dim]; cached, since most slices share a few sides."""
    return sincos_positions(np.arange(count), dim)


class ResamplerAttention(nn.MultiheadAttention):
    """Cross-attention of one set of queries with packed units; called without `lengths`, the stock module.

    Its parameters keep the names of the checkpoint and it stays a `nn.MultiheadAttention` for exporters and PEFT.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args, lengths: list[int] | None = None, **kwargs
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """query [Q, D], key and value [patches, D], `lengths` patches of each unit -> [units, Q, D]."""
        if lengths is None:
            return super().forward(query, key, value, *args, **kwargs)
        (w_q, w_k, w_v), (b_q, b_k, b_v) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query = self._heads(nn.functional.linear(query, w_q, b_q), 1)  # [1, H, Q, d]
        key = nn.functional.linear(key, w_k, b_k)
        value = nn.functional.linear(value, w_v, b_v)
        outputs = []
        runs = equal_runs(lengths)
        keys, values = (states.split([count * length for _, count, length in runs]) for states in (key, value))
        for own_keys, own_values, (_, count, _) in zip(keys, values, runs, strict=True):
            attended = nn.functional.scaled_dot_product_attention(
                query.expand(count, -1, -1, -1), self._heads(own_keys, count), self._heads(own_values, count)
            )
            outputs.append(attended.transpose(1, 2).flatten(2))
        return self.out_proj(torch.cat(outputs))

    def _heads(self, states, count):
        return states.view(count, -1, self.num_heads, self.head_dim).transpose(1, 2)


class Resampler(nn.Module):
    """Learned queries, one a token that a unit becomes, which read the patches of the unit.

    `embed_dim` is the width D of the language model, `kv_dim` that of the tower.
    """

    def __init__(self, num_queries: int, embed_dim: int, num_heads: int, kv_dim: int):
        super().__init__()
        self.num_queries = num_queries
        self.embed_dim = embed_dim
        self.query = nn.Parameter(torch.zeros(num_queries, embed_dim))
        self.kv_proj = nn.Linear(kv_dim, embed_dim, bias=False)
        self.attn = ResamplerAttention(embed_dim, num_heads)
        self.ln_q = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_kv = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_post = nn.LayerNorm(embed_dim, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(embed_dim, embed_dim))

    def forward(
        self, hidden_states: Tensor, tgt_sizes: Sequence[tuple[int, int]], temporal_ids: Sequence[Sequence[int]]
    ) -> Tensor:
        """Compress the packed output of the tower [patches, kv_dim] to [units, num_queries, D].

        Args:
            tgt_sizes: (rows, columns) in patches of every slice; the frames of a unit stand together.
            temporal_ids: list of units, each a list with one id a frame, in tenths of a second; [-1] for an image.
        """
        frames = [frame for unit in temporal_ids for frame in unit]
        if len(frames) != len(tgt_sizes):
            raise ValueError(f"temporal_ids name {len(frames)} frames, but there are {len(tgt_sizes)} slices.")
        patches = iter([rows * columns for rows, columns in tgt_sizes])
        lengths = [sum(next(patches) for _ in unit) for unit in temporal_ids]
        values = self.ln_kv(self.kv_proj(hidden_states))  # [patches, D]
        keys = values + self.positions(tgt_sizes, frames, values.device).to(values.dtype)
        attended = self.attn(self.ln_q(self.query), keys, values, lengths=lengths)  # [units, Q, D]
        return self.ln_post(attended) @ self.proj

    def positions(
        self, tgt_sizes: Sequence[tuple[int, int]], temporal_ids: Sequence[int], device: torch.device | str
    ) -> Tensor:
        """Position of every patch, float32 [patches, D]: column, row and, for a frame of a video, its time."""
        half = self.embed_dim // 2
        grids = {}
        for rows, columns in set(tgt_sizes):
            by_row = torch.from_numpy(axis_positions(rows, half)).to(device)
            by_column = torch.from_numpy(axis_positions(columns, half)).to(device)
            halves = (by_column.expand(rows, -1, -1), by_row[:, None].expand(-1, columns, -1))
            grids[rows, columns] = torch.cat(halves, dim=-1).flatten(0, 1)  # [rows * columns, D]
        positions = [grids[size] for size in tgt_sizes]
        if any(frame != STILL_IMAGE_ID for frame in temporal_ids):
            times = torch.from_numpy(sincos_positions(temporal_ids, self.embed_dim)).to(device)
            positions = [
                position if frame == STILL_IMAGE_ID else position + time
                for position, frame, time in zip(positions, temporal_ids, times, strict=True)
            ]
        return torch.cat(positions)
