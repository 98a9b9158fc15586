"""What a conversation need not compute twice: its pictures, and the states of the prompt's beginning.

What is special:
- Pictures are known again by what the caller gave: the same object or bytes, or a path whose file has not changed. The
  processor still writes every prompt itself; it is only handed the slices that it made before.
- A slice loses its pixels once the model has read it: features are a fraction of them.
- Cached states count for a prompt as far as both begin with the same tokens and the same pictures, and no further: a
  slot is compared by the picture that fills it, not by its id, which all slots share.
"""

import copy
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import DynamicCache


class EncodedImageError(ValueError):
    """An encoded picture is used in another way than it was encoded for."""


class Slice:
    """A slice of a picture or frame, known by its identity; without pixels once it is encoded."""

    __slots__ = ("pixels", "size")

    def __init__(self, pixels, size):
        self.pixels = pixels  # [3, P, P * patches]
        self.size = size  # (rows, columns) in patches


@dataclass(frozen=True)
class EncodedImage:
    """A picture that the model has read (`model.encode_images`); stands in messages where a picture may stand."""

    image: object  # what was given
    sliced: object  # the processor's `SlicedImage`, whose `pixel_values` are [`Slice`]s
    features: dict  # (model, unit) -> features [query_num, D]


@dataclass(frozen=True)
class Prompt:
    """The prompt of one conversation.

    `ids` are its token ids, `keys` the same with the visual unit in place of the id at every slot, `units` its visual
    units: (temporal ids, slice, ...) each.
    """

    ids: list
    keys: list
    units: list


class ConversationCache:
    """The pictures and the key-value states of one conversation.

    Batches have use for the pictures alone; a list of keys belongs to one conversation.
    """

    def __init__(self):
        # (kind, what the caller gave) -> (what the caller gave, what the processor made of it, state of its file)
        self.media = {}
        self.features = {}  # (model, unit) -> features [query_num, D]
        self.keys = []  # of the tokens whose states are cached
        self.states = None

    def fork(self):
        """A copy that shares what is computed. Neither changes the other: states grow into new tensors."""
        other = ConversationCache()
        other.media, other.features = dict(self.media), dict(self.features)
        other.keys, other.states = list(self.keys), _shared(self.states)
        return other

    # ---- pictures ----

    def attach(self, processor):
        """The processor, looking here before it makes slices."""
        processor = copy.copy(processor)
        images, videos = processor.image_processor, processor.video_processor
        processor.image_processor, processor.video_processor = copy.copy(images), copy.copy(videos)
        processor.image_processor.slice_all_to_patches = partial(self._slice_pictures, images)
        processor.video_processor.preprocess = partial(self._slice_clip, videos)
        return processor

    def _slice_pictures(self, image_processor, images, max_slice_nums=None, input_data_format=None):
        images = list(images)
        new = {}
        for image in images:
            if isinstance(image, EncodedImage):
                if image_processor.get_sliced_grid(image.sliced.image_size, max_slice_nums) != image.sliced.grid:
                    raise EncodedImageError(
                        f"A picture was encoded in slices {image.sliced.grid}, but max_slice_nums={max_slice_nums} cuts "
                        "it otherwise. Give encode_images the same max_slice_nums."
                    )
                self.features.update(image.features)
                self.media["image", id(image)] = image, image.sliced, None
            elif not self._is_known("image", image):
                new[_key("image", image)] = image
        states = [_file_state(image) for image in new.values()]
        sliced = image_processor.slice_all_to_patches(new.values(), max_slice_nums, input_data_format)
        for (key, image), picture, state in zip(new.items(), sliced, states, strict=True):
            self.media[key] = image, known_slices(picture), state
        return [self.media[_key("image", image)][1] for image in images]

    def _slice_clip(self, video_processor, video, **options):
        key = _key("video", video)
        if not self._is_known("video", video):
            state = _file_state(video)
            clip = video_processor.preprocess(video, **options)
            sizes = map(tuple, clip["tgt_sizes"][0].tolist())
            clip["pixel_values"] = [[Slice(*pair) for pair in zip(clip["pixel_values"][0], sizes, strict=True)]]
            self.media[key] = video, clip, state
        return self.media[key][1]

    def _is_known(self, kind, given):
        """Whether slices of it are here, and those of what its file holds now; a file that is gone has not changed."""
        known = self.media.get(_key(kind, given))
        return known is not None and _file_state(given) in (None, known[2])

    def encode(self, units, *models):
        """Let each model read the units that it has not read; then their pixels are dropped.

        Raises:
            EncodedImageError: a unit is new to a model, but its pixels are gone.
        """
        for model in models:
            new = [unit for unit in dict.fromkeys(units) if (model, unit) not in self.features]
            if not new:
                continue
            slices = [part for _, *parts in new for part in parts]
            if any(part.pixels is None for part in slices):
                raise EncodedImageError(
                    "A picture was encoded by another model, or as a still picture, and has no pixels left: pass the "
                    "picture itself. An assistant_model of a session is given to start_chat."
                )
            pixels = [part.pixels.to(model.device) for part in slices]
            with torch.no_grad():
                features = model.get_image_features(
                    [pixels], [[part.size for part in slices]], [[list(ids) for ids, *_ in new]]
                ).pooler_output
            self.features.update({(model, unit): rows for unit, rows in zip(new, features, strict=True)})
        for _, *parts in units:
            for part in parts:
                part.pixels = None

    def rows(self, units, model):
        """Features of encoded units [slots, D], or None where there are none."""
        return torch.cat([self.features[model, unit] for unit in units]) if units else None

    def keep_only(self, units):
        """Forget pictures that are not among `units`."""
        slices = {part for _, *parts in units for part in parts}
        self.features = {key: rows for key, rows in self.features.items() if slices.issuperset(key[1][1:])}
        made = {key: entry[1] for key, entry in self.media.items()}
        for (kind, given), media in made.items():
            if not slices.issuperset(media["pixel_values"][0] if kind == "video" else media.pixel_values):
                del self.media[kind, given]

    # ---- states ----

    def common_length(self, keys):
        """Tokens that the cached ones and `keys` begin with; at least one of `keys` is left to compute."""
        pairs = enumerate(zip(self.keys, keys[:-1], strict=False))
        return next((place for place, (ours, wanted) in pairs if ours != wanted), min(len(self.keys), len(keys) - 1))

    def cut(self, keys):
        """Drop the states behind the common beginning with `keys`; returns its length."""
        common = self.common_length(keys)
        if common < len(self.keys):
            self.states.crop(common - len(self.keys))  # a negative number of tokens means the same in every version
            self.keys = self.keys[:common]
        return common

    def read(self, model, prompt):
        """Compute the states of a whole prompt; returns the last hidden state [1, D]."""
        start = self._begin(model, prompt.keys)
        with self._all_or_nothing(), torch.no_grad():
            ids = torch.tensor([prompt.ids], device=model.device)
            rows = model.uncached_rows(self.rows(prompt.units, model), ids, start)
            hidden = model.backbone_forward(
                ids[:, start:],
                mm_encoder_outputs={"image": rows},
                past_key_values=self.states,
                use_cache=True,
            ).last_hidden_state
            self.keys = list(prompt.keys)
        return hidden[:, -1]

    def generate(self, model, prompt, draft=(), **arguments):
        """`model.generate` behind `prompt` and the `draft` of an answer, from the states that are cached; the states of
        what it reads and writes are kept. Returns its output.

        After an error nothing is cached: the next call computes its prompt anew.
        """
        keys = [*prompt.keys, *draft]
        ids = torch.tensor([[*prompt.ids, *draft]], device=model.device)
        beams = arguments.get("num_beams") or 1
        if beams > 1:  # the beams go on from copies, and the states of their text are not kept
            if len(keys) > 1:
                self.read(model, Prompt(ids[0, :-1].tolist(), keys[:-1], prompt.units))
            states = _shared(self.states)
            states.batch_repeat_interleave(beams)
            return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=states, **arguments)
        self._begin(model, keys)
        rows = self.rows(prompt.units, model)
        features = {} if rows is None else {"image": rows}
        assistant = arguments.get("assistant_model")
        if features and hasattr(assistant, "get_image_features"):
            features["assistant"] = self.rows(prompt.units, assistant)
        with self._all_or_nothing():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self.states,
                **({"mm_encoder_outputs": features} if features else {}),
                **arguments,
            )
            new = getattr(output, "sequences", output)[0, ids.shape[1] :].tolist()
            self.keys = [*keys, *new][: self.states.get_seq_length()]
        return output

    def _begin(self, model, keys):
        if self.states is None:
            self.states = DynamicCache(config=model.config)
        return self.cut(keys)

    @contextmanager
    def _all_or_nothing(self):
        try:
            yield
        except BaseException:
            self.keys, self.states = [], None
            raise


def known_slices(picture):
    """The processor's `SlicedImage` with [`Slice`]s in place of tensors."""
    pairs = zip(picture.pixel_values, picture.tgt_sizes, strict=True)
    return replace(picture, pixel_values=[Slice(*pair) for pair in pairs])


def read_units(inputs):
    """The visual units of each sample in the processor's output: lists of (temporal ids, slice, ...)."""
    samples = []
    for index, slices in enumerate(inputs.get("pixel_values") or [[]] * len(inputs["input_ids"])):
        groups = inputs["temporal_ids"][index] if "temporal_ids" in inputs else [[-1]] * len(slices)
        parts = iter(slices)
        samples.append([(tuple(group), *(next(parts) for _ in group)) for group in groups])
    return samples


def slot_keys(ids, units, image_token_id):
    """`ids` with the unit in place of the id at every slot."""
    places = [place for place, token in enumerate(ids) if token == image_token_id]
    keys = list(ids)
    for index, place in enumerate(places):
        keys[place] = units[index * len(units) // len(places)]
    return keys


def _key(kind, given):
    return kind, given if isinstance(given, (str, bytes, os.PathLike)) else id(given)


def _file_state(given):
    """Time and size of the file at a path, which tell whether it was written anew; None where there is none."""
    if not isinstance(given, (str, os.PathLike)):
        return None
    try:
        found = os.stat(given)
    except (OSError, ValueError):  # an address, a data URL, or a file that is gone
        return None
    return found.st_mtime_ns, found.st_size


def _shared(states):
    """A cache of its own with the same tensors. Layers replace their tensors when they grow or are cut."""
    if states is None:
        return None
    states = copy.copy(states)
    states.layers = [copy.copy(layer) for layer in states.layers]
    return states
