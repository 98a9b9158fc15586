"""A language model in other software that keeps its states itself, as a module of PyTorch: it stands where the model's own
`llm` stands.

So everything above it stays as it is: prompts, packed videos, slices, sampling, thoughts, streams, sessions.

What is special:
- What has been read is kept in the caller's own cache, as embeddings; the software's states are a memory beside it, which is
  used as far as it begins alike, and made anew where it does not. So a cache may be cropped, forked, reordered or
  forgotten by those who know nothing of the software.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from minicpmv.errors import MiniCPMVError


CELLS = 256  # room for tokens comes in multiples
CACHE_NAMES = ("past_key_values", "cache")  # before and since transformers 5.24
CACHE_FIELD = next(name for name in reversed(CACHE_NAMES) if name in CausalLMOutputWithPast.__dataclass_fields__)


class Part(NamedTuple):
    """What is to be read behind the states of one sequence."""

    sequence: int
    start: int  # its first position; states from there on are forgotten
    rows: np.ndarray  # float32 [n, D]
    wanted: np.ndarray  # bool [n]: whose logits


class Reader(Protocol):
    """Software with the states of several sequences."""

    name: str  # of what it reads
    software: str
    most_sequences: int
    sequences: int  # that there is room for
    cells: int  # tokens in each

    @property
    def error(self) -> type[MiniCPMVError]:
        """The software's own."""

    def reserve(self, sequences: int, cells: int) -> None:
        """Make room anew; all states are forgotten."""

    def read(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """Read the parts; returns the logits [wanted, V] of each."""


class Known(NamedTuple):
    """What the states of a sequence in llama.cpp were made of."""

    numbers: np.ndarray  # int64 [n], one for each row that was read
    used: int  # the call that last asked for them


class History(NamedTuple):
    """What one row of a batch has read so far, and is to read now."""

    rows: np.ndarray  # float32 [L, D], with padding
    places: np.ndarray  # int64 [n], of those that are no padding
    numbers: np.ndarray  # int64 [n]
    wanted: np.ndarray  # bool [n]: whose logits


@dataclass
class Room:
    """Memory in which a tensor grows; several layers may see its beginning."""

    buffer: Tensor  # [B, 1, capacity, ...]
    written: int  # rows


class GrowingLayer(DynamicLayer):
    """A layer of a cache that has room for more: with torch.cat alone every new token costs a copy of all rows, which are
    134 MB at 8,192 of width 4096.

    Rows are written once. A copy of this layer, or one that was cropped, writes into the same memory only where nobody else
    has gone on from there; else it takes memory of its own.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, Room] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        self.keys = self._grown("keys", self.keys, key_states)
        self.values = self._grown("values", self.values, value_states)
        return self.keys, self.values

    def _grown(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        length, total = held.shape[-2], held.shape[-2] + new.shape[-2]
        room = self._rooms.get(name)
        if (
            room is None
            or room.buffer.data_ptr() != held.data_ptr()
            or room.written != length
            or room.buffer.shape[-2] < total
        ):
            room = Room(new.new_empty(*new.shape[:-2], total + max(CELLS, total // 4), new.shape[-1]), length)
            room.buffer[..., :length, :] = held
            self._rooms = {**self._rooms, name: room}  # copies of this layer keep theirs
        room.buffer[..., length:total, :] = new
        room.written = total
        return room.buffer[..., :total, :]


class RememberingForCausalLM(nn.Module):
    """A language model; called as `Qwen3ForCausalLM` is, it returns logits and the cache.

    Args:
        reader: what computes.
        embed_tokens: ids [...] -> float32 [..., D].
        config: that of the whole model.
        versions: of the software, by name.
    """

    def __init__(self, reader: Reader, embed_tokens: nn.Module, config: Any, versions: dict[str, str]):
        super().__init__()
        self.config, self.embed_tokens, self.versions = config, embed_tokens, versions
        self._reader = reader
        # Odd numbers by which a row becomes one: rows that differ in a bit differ in it, but for a chance of 2 ** -64.
        odd = np.random.default_rng(0).integers(-(2**62), 2**62, config.hidden_size) * 2 + 1
        self._odd = torch.from_numpy(odd)
        self._known: list[Known] = []  # of each sequence
        self._calls = 0
        self._lock = threading.Lock()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None  # they are in the file

    def get_decoder(self) -> nn.Module:
        raise self._refusal("the hidden states")

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over a batch [B, L, D] behind what the cache holds; logits [B, kept, V].

        `position_ids` are not read: positions count the tokens that `attention_mask` [B, cached + L] leaves.

        Raises:
            MiniCPMVError: what the software cannot give is asked for, or it fails; of the software's own type.
        """
        asked = {"a loss": labels is not None, "attentions": output_attentions, "hidden states": output_hidden_states}
        for what, is_asked in asked.items():
            if is_asked:
                raise self._refusal(what)
        cache = past_key_values if cache is None else cache
        if not (cache is None or isinstance(cache, DynamicCache)):
            raise self._refusal(f"a {type(cache).__name__}")
        rows = inputs_embeds.detach().float().cpu()  # [B, L, D]
        numbers = self._numbers(rows)  # [B, L]
        new = rows.shape[1]
        if cache is not None:
            if cache.get_seq_length() == 0:
                cache.layers[:] = [GrowingLayer()]
            # The layer's keys are the numbers of the rows, and its values are the rows: [B, 1, cached + L, ...].
            with self._lock:  # conversations that forked share memory, and may go on in several threads
                keys, values = cache.update(numbers[:, None, :, None], rows[:, None], 0)
            numbers, rows = keys[:, 0, :, 0], values[:, 0]
        # In numpy from here on: a token is many small steps, each of which takes torch longer.
        size, length = rows.shape[:2]
        is_real = np.ones((size, length), dtype=bool)
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
                raise self._reader.error(
                    f"{self._reader.software} takes a mask of {(size, length)}, not {tuple(attention_mask.shape)}"
                )
            is_real = attention_mask.cpu().numpy()[:, :length] != 0
        kept = np.arange(length - new, length)
        kept = kept[-logits_to_keep:] if isinstance(logits_to_keep, int) else kept[logits_to_keep.cpu().numpy()]
        wanted = np.zeros(length, dtype=bool)
        wanted[kept] = True
        with self._lock:
            known, read = numbers.numpy(), rows.numpy()
            histories = [
                History(read[place], np.flatnonzero(real), known[place, real], wanted[real])
                for place, real in enumerate(is_real)
            ]
            found = self._read(histories)
        places = np.flatnonzero(wanted)
        if size == 1 and len(found[0]) == len(places):  # most often; a copy of 150,000 numbers a token is saved
            logits = torch.from_numpy(found[0])[None]
        else:
            logits = torch.zeros(size, len(places), self.config.vocab_size)  # of padding: zeros
            for place, part in enumerate(found):
                logits[place, torch.from_numpy(is_real[place, places])] = torch.from_numpy(part)
        if not np.array_equal(places, kept):  # asked for in an order of the caller's
            logits = logits[:, torch.from_numpy(np.searchsorted(places, kept))]
        return CausalLMOutputWithPast(logits=logits.to(inputs_embeds.device), **{CACHE_FIELD: cache})

    def _refusal(self, what: str) -> MiniCPMVError:
        return self._reader.error(
            f"{self._reader.name} runs in {self._reader.software}, which gives logits alone, from states of its own: for {what} "
            "load the checkpoint itself"
        )

    def _numbers(self, rows: Tensor) -> Tensor:
        """One number for each row, int64 [B, L]."""
        return (rows.contiguous().view(torch.int32).long() * self._odd).sum(-1)

    def _read(self, histories: list["History"]) -> list[np.ndarray]:
        """Logits of the wanted rows of histories, which are read as far as they are new."""
        self._make_room(len(histories), max(len(history.numbers) for history in histories))
        self._calls += 1
        parts: list[Part] = []
        free = set(range(len(self._known)))
        for rows, places, numbers, wanted in histories:
            # The states that most of it begins with, unless most of them would be lost, since another conversation may go
            # on from them; of equals, those that nobody has asked for the longest.
            common = {place: common_length(self._known[place].numbers, numbers) for place in free}
            kept = {place: n if 2 * n >= len(self._known[place].numbers) else 0 for place, n in common.items()}
            sequence = max(free, key=lambda place: (kept[place], -self._known[place].used))
            free.remove(sequence)
            asked = np.flatnonzero(wanted)
            start = int(min(common[sequence], asked[0] if len(asked) else len(numbers)))
            parts.append(Part(sequence, start, rows[places[start:]], wanted[start:]))
        # Whatever fails on the way, states that are half made count for nothing.
        for part in parts:
            self._known[part.sequence] = Known(np.empty(0, np.int64), self._calls)
        logits = self._reader.read(parts)
        for part, history in zip(parts, histories, strict=True):
            self._known[part.sequence] = Known(history.numbers, self._calls)
        return logits

    def _make_room(self, sequences: int, tokens: int) -> None:
        reader = self._reader
        limit = self.config.max_position_embeddings
        if tokens > limit or sequences > reader.most_sequences:
            raise reader.error(
                f"{sequences} conversations of {tokens} tokens are asked for; there is room for {reader.most_sequences} of "
                f"{limit}: ask about less at once, or in smaller batches"
            )
        if sequences > reader.sequences or tokens > reader.cells:
            cells = max(reader.cells, -(-(tokens + CELLS) // CELLS) * CELLS)
            if reader.cells and tokens > reader.cells:
                cells = max(cells, 2 * reader.cells)  # rather seldom, since all is read again then
            sequences = max(sequences, reader.sequences)
            self._known = []
            reader.reserve(sequences, min(cells, -(-limit // CELLS) * CELLS))
            self._known = [Known(np.empty(0, np.int64), 0)] * sequences


def common_length(ours: np.ndarray, wanted: np.ndarray) -> int:
    """How many numbers both begin with."""
    length = min(len(ours), len(wanted))
    differs = np.flatnonzero(ours[:length] != wanted[:length])
    return int(differs[0]) if len(differs) else length
