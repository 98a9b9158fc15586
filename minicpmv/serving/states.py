"""Key-value states of the rows of a batch: rows join, leave, and go on from what earlier requests have left.

What is special:
- Rows are padded on the left, so that all grow at the same end; the mask tells what is padding.
- Nothing here knows what states are. Those of llama.cpp are the embeddings that were read: one layer, of other widths.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from minicpmv.runtimes.language_model import common_length


States = list[tuple[Tensor, Tensor]]  # of each layer: keys and values [rows, heads, tokens, width]


def to_cache(states: States) -> DynamicCache:
    """A cache that holds states; it grows without changing them."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(states):
        cache.update(keys, values, layer)
    return cache


def of_cache(cache: DynamicCache) -> States:
    """The states in a cache, which are still its own."""
    return [(layer.keys, layer.values) for layer in cache.layers if layer.get_seq_length()]


def cut(states: States, row: int, first: int, last: int) -> States:
    """Those of the tokens from `first` up to `last` of a row, in memory of their own."""
    return [tuple(part[row : row + 1, :, first:last].clone() for part in layer) for layer in states]  # type: ignore[misc]


def begin(states: States, length: int) -> States:
    """Those of the first tokens; they share memory."""
    return [(keys[:, :, :length], values[:, :, :length]) for keys, values in states]


def bytes_of(states: States) -> int:
    return sum(part.nbytes for layer in states for part in layer)


class Batch:
    """The states of the rows that are written at the same time.

    Attributes:
        lengths: tokens of each row.
        width: those of the longest, and so what each row takes.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.cache: DynamicCache | None = None

    @property
    def width(self) -> int:
        return max(self.lengths, default=0)

    def join(self, states: States, length: int) -> None:
        """Add a row with the states of its tokens [1, heads, length, width]."""
        old = [] if self.cache is None else of_cache(self.cache)
        width = max(self.width, length)
        rows = [*([old] if old else []), states]
        joined = []
        for layer in zip(*rows, strict=True):
            parts = [torch.cat([_padded(part, width) for part in kind]) for kind in zip(*layer, strict=True)]
            joined.append((parts[0], parts[1]))
        self.cache = to_cache(joined)
        self.lengths.append(length)

    def leave(self, row: int) -> States:
        """Take a row out; returns its states."""
        assert self.cache is not None
        states, width = of_cache(self.cache), self.width
        left = cut(states, row, width - self.lengths[row], width)
        del self.lengths[row]
        kept = [place for place in range(len(self.lengths) + 1) if place != row]
        excess = width - self.width
        self.cache = to_cache([(k[kept, :, excess:], v[kept, :, excess:]) for k, v in states]) if kept else None
        return left

    def inputs(self, tokens: Sequence[int], device: Any) -> dict[str, Any]:
        """What the model takes for the next token of each row; afterwards each is one longer."""
        width, lengths = self.width, torch.tensor(self.lengths, device=device)
        mask = torch.arange(width + 1, device=device) >= (width - lengths)[:, None]  # [rows, width + 1]
        self.lengths = [length + 1 for length in self.lengths]
        return {
            "input_ids": torch.tensor(tokens, device=device)[:, None],
            "attention_mask": mask.long(),
            "position_ids": lengths[:, None],
            "cache": self.cache,
        }


def _padded(part: Tensor, width: int) -> Tensor:
    missing = width - part.shape[2]
    return F.pad(part, (0, 0, missing, 0)) if missing else part


@dataclass
class Remembered:
    """States of a prompt and its answer, and what they were made of."""

    keys: np.ndarray  # int64 [tokens]
    states: States
    units: list[Any]  # hold the slices, so that no others get their keys
    bytes: int


class PrefixMemory:
    """The states of the prompts and answers that were written last, within a bound of bytes.

    A request that begins like one of them goes on from its states.
    """

    def __init__(self, megabytes: float) -> None:
        self.most = int(megabytes * 1e6)
        self.bytes = 0
        self._known: OrderedDict[int, Remembered] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()

    def find(self, keys: list[int]) -> tuple[States, int]:
        """The states that begin as a prompt does, and for how many of its tokens; at least one is left to compute."""
        wanted = np.asarray(keys[:-1], dtype=np.int64)
        with self._lock:
            best, length = None, 0
            for name, known in self._known.items():
                common = common_length(known.keys, wanted)
                if common > length:
                    best, length = name, common
            if best is None:
                return [], 0
            self._known.move_to_end(best)
            return begin(self._known[best].states, length), length

    def keep(self, keys: list[int], states: States, units: list[Any]) -> None:
        """Remember states; those that are wholly the beginning of them are forgotten, then those asked for longest ago."""
        new = Remembered(np.asarray(keys, dtype=np.int64), states, units, bytes_of(states))
        with self._lock:
            if new.bytes > self.most:
                return
            for name, known in list(self._known.items()):
                if common_length(known.keys, new.keys) == len(known.keys):
                    self._forget(name)
            self._count += 1
            self._known[self._count] = new
            self.bytes += new.bytes
            while self.bytes > self.most:
                self._forget(next(iter(self._known)))

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._known.clear()
            self.bytes = 0

    def _forget(self, name: int) -> None:
        self.bytes -= self._known.pop(name).bytes
