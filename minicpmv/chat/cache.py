"""What a conversation need not compute twice: its pictures, and the states of the prompt's beginning.

What is special:
- Pictures are known again by what the caller gave: the same object or bytes, or a path whose file has not changed.
- A slice is known by its identity, and loses its pixels once the model has read it: features are a fraction of them.
- Cached states count for a prompt as far as both begin with the same tokens and the same pictures, and no further: a
  slot is compared by the picture that fills it, not by its id, which all slots share.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache


class KnownMedia(NamedTuple):
    source: Any  # what the caller gave; kept, so that its id stays its own
    made: Any  # what the processor made of it, with stand-ins for the slices
    file: tuple[int, int] | None  # time and size of the file


class ConversationCache:
    """The memory of one conversation, as the turns of a model use it (`model.chat_turn(memory=...)`).

    Args:
        image_processor, max_slice_nums: how pictures that were encoded before have to be sliced.
        slot: id of the token that features replace.
    """

    def __init__(self, image_processor, max_slice_nums: int | None, slot: int):
        self._image_processor, self._max_slice_nums, self._slot = image_processor, max_slice_nums, slot
        self._media: dict[tuple, KnownMedia] = {}  # (kind, what the caller gave) -> ...
        # Stand-in of a slice (an empty tensor of its shape) -> its pixels, until they are read.
        self._pixels: dict[torch.Tensor, torch.Tensor] = {}
        self._features: dict[tuple, torch.Tensor] = {}  # (model, visual unit) -> [Q, D]
        self._keys: list = []  # of the tokens whose states are cached: ids, and at slots the visual unit
        self._states: DynamicCache | None = None

    def __len__(self) -> int:
        """Tokens whose states are cached."""
        return len(self._keys)

    def fork(self) -> "ConversationCache":
        """A copy that shares what is computed. Neither changes the other: states grow into new tensors."""
        other = copy.copy(self)
        other._media, other._pixels, other._features = dict(self._media), dict(self._pixels), dict(self._features)
        other._keys, other._states = list(self._keys), copy.copy(self._states)
        if other._states is not None:
            other._states.layers = [copy.copy(layer) for layer in other._states.layers]
        return other

    # ---- pictures ----

    def get(self, kind: str, sources: list, make: Callable[[list], list]) -> list:
        """What the processor made of images or videos; made now of those that are new, or whose files changed."""
        keys = [(kind, s if isinstance(s, (str, bytes, os.PathLike)) else id(s)) for s in sources]
        new = {}
        for key, source in zip(keys, sources, strict=True):
            known, file = self._media.get(key), _file_state(source)
            if hasattr(source, "sliced"):  # `model.encode_images`
                self._features |= source.features
                made = source.slices(self._image_processor, self._max_slice_nums)
                self._media[key] = KnownMedia(source, made, None)
            elif known is None or file not in (None, known.file):  # a file that is gone has not changed
                new[key] = source, file
        made_of_new = make([source for source, _ in new.values()])
        for (key, (source, file)), made in zip(new.items(), made_of_new, strict=True):
            self._media[key] = KnownMedia(source, self._without_pixels(made), file)
        return [self._media[key].made for key in keys]

    def _without_pixels(self, made: Any) -> Any:
        slices = made["pixel_values"][0] if isinstance(made, Mapping) else made.pixel_values
        stand_ins = [torch.empty_like(pixels, device="meta") for pixels in slices]
        self._pixels |= zip(stand_ins, slices, strict=True)
        if isinstance(made, Mapping):  # a clip
            return type(made)({**made, "pixel_values": [stand_ins]})  # type: ignore[call-arg]
        return replace(made, pixel_values=stand_ins)

    def features(self, units: list, model) -> torch.Tensor:
        """Features [units, Q, D] of visual units; those that are new to `model` are encoded.

        Raises:
            ValueError: a unit is new to the model, but its pixels are gone.
        """
        if new := [unit for unit in dict.fromkeys(units) if (model, unit) not in self._features]:
            whole = [replace(u, slices=tuple(self._pixels.get(s, s) for s in u.slices)) for u in new]
            self._features |= {(model, u): rows for u, rows in zip(new, model.encode_units(whole), strict=True)}
        return torch.stack([self._features[model, unit] for unit in units])

    def keep_only(self, units: list) -> None:
        """Forget the pictures that are not among the visual units of the conversation, and the pixels of all."""
        slices = {part for unit in units for part in unit.slices}
        self._pixels = {}
        self._features = {key: rows for key, rows in self._features.items() if slices.issuperset(key[1].slices)}
        for key, known in list(self._media.items()):
            made = known.made["pixel_values"][0] if key[0] == "video" else known.made.pixel_values
            if not slices.issuperset(made):
                del self._media[key]

    # ---- states ----

    def cached_tokens(self, prompt) -> int:
        """Tokens that the cached ones and the prompt begin with; at least one of its own is left to compute."""
        return self._common(self._keys_of(prompt))

    def generate(self, model, prompt, draft: list[int], arguments: dict[str, Any]) -> Any:
        """`model.generate` behind the prompt and the `draft` of an answer, from the states that are cached; the states of
        what it reads and writes are kept. Returns its output.

        After an error nothing is cached: the next call computes its prompt anew. Beams compute all of it.
        """
        ids = torch.tensor([[*prompt.input_ids[0].tolist(), *draft]], device=model.device)
        arguments = arguments | {"attention_mask": torch.ones_like(ids)}
        if (arguments.get("num_beams") or 1) > 1:
            return model.generate(ids, **arguments)
        keys = [*self._keys_of(prompt), *draft]
        common = self._common(keys)
        with self._all_or_nothing():
            if self._states is None:
                self._states = DynamicCache(config=model.config)
            if common < len(self._keys):
                self._states.crop(common - len(self._keys))  # a negative number means the same in every version
            output = model.generate(ids, past_key_values=self._states, **arguments)
            new = getattr(output, "sequences", output)[0, ids.shape[1] :].tolist()
            self._keys = [*keys, *new][: self._states.get_seq_length()]
        return output

    def _keys_of(self, prompt) -> list:
        keys, (units,) = prompt.input_ids[0].tolist(), prompt.units
        slots = [place for place, token in enumerate(keys) if token == self._slot]
        for index, place in enumerate(slots):
            keys[place] = units[index * len(units) // len(slots)]
        return keys

    def _common(self, keys: list) -> int:
        pairs = enumerate(zip(self._keys, keys[:-1], strict=False))
        return next((place for place, (ours, wanted) in pairs if ours != wanted), min(len(self._keys), len(keys) - 1))

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._keys, self._states = [], None
            raise


def _file_state(source: Any) -> tuple[int, int] | None:
    """Time and size of the file at a path, which tell whether it was written anew; None where there is none."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    try:
        found = os.stat(source)
    except (OSError, ValueError):  # an address, a data URL, or a file that is gone
        return None
    return found.st_mtime_ns, found.st_size
