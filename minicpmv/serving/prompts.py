"""A request -> what the model reads.

What is special:
- Prompts are written by the model's own `chat_turn`, so an answer is that of `model.chat`.
- Images and videos are known by their content, whichever request brings them: what was read of one is not read again, and
  its place in a prompt is known by it.
"""

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jinja2 import TemplateError

from minicpmv.errors import is_expected
from minicpmv.serving.schema import ChatRequest, RequestError


KNOWN_BYTES = (
    1e9  # of the slices of images and videos that are kept, as they were made: what is read of them is smaller
)
PLAIN_TEMPLATE = "{{ messages[0]['content'] }}"


@dataclass
class Prompt:
    """What the model reads for one answer."""

    ids: list[int]
    keys: list[int]  # ids of tokens, but in a slot of an image a number that is its own
    units: list[Any]  # the visual units, in the order of their slots; they hold slices and features

    @property
    def bytes(self) -> int:
        """Of the slices that are not read yet."""
        return sum(pixels.nbytes for unit in self.units for pixels in unit.slices)


class MediaStore:
    """What the processor made of images and videos that were given lately. Several threads may use it."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple, tuple[Any, int]] = OrderedDict()  # what was made, and its bytes then
        self._bytes = 0
        self._lock = threading.Lock()

    def reader(self, options: dict[str, Any]) -> "MediaReader":
        """For one prompt, whose images and videos are read with these options."""
        return MediaReader(self, tuple(sorted(options.items())))

    def find(self, key: tuple) -> Any:
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key][0]

    def keep(self, key: tuple, made: Any) -> Any:
        """What is known by the key from now on: what came first, since features may ride on it already."""
        with self._lock:
            if key in self._known:
                return self._known[key][0]
            images = getattr(made, "frames", [made])
            size = sum(pixels.nbytes for image in images for pixels in image.pixel_values)
            self._known[key] = made, size
            self._bytes += size
            while self._bytes > KNOWN_BYTES:
                self._bytes -= self._known.popitem(last=False)[1][1]
            return made


class MediaReader:
    """The media cache of one prompt, as the processor asks it."""

    def __init__(self, store: MediaStore, options: tuple) -> None:
        self._store, self._options = store, options
        self._own: dict[tuple, Any] = {}  # a prompt that is written twice reads its images once

    def get(self, kind: str, sources: list, make: Callable[[list], list]) -> list:
        """What the processor made of images or videos, made now of those that are new."""
        keys = [self._key(kind, source) for source in sources]
        new = {}
        for key, source in zip(keys, sources, strict=True):
            if key not in self._own and (made := self._store.find(key)) is not None:
                self._own[key] = made
            if key not in self._own:
                new[key] = source
        for key, made in zip(new, make(list(new.values())), strict=True):
            self._own[key] = self._store.keep(key, made)
        return [self._own[key] for key in keys]

    def _key(self, kind: str, source: Any) -> tuple:
        whole, data = (True, source) if isinstance(source, bytes) else (False, source.tobytes())
        return kind, whole, len(data), hashlib.sha256(data).digest(), self._options


class PromptReader:
    """Writes the prompts of requests. Several threads may use it.

    Args:
        think: whether the model thinks where a request does not say.
    """

    def __init__(self, model: Any, processor: Any, think: bool) -> None:
        self.model, self.processor, self.think = model, processor, think
        self.context = model.config.max_position_embeddings
        self._store = MediaStore()

    def check_images(self, request: ChatRequest, sizes: list[tuple[int, int]], videos: int) -> None:
        """Refuse images that do not fit into the context, before they are decoded.

        Raises:
            RequestError: they do not.
        """
        images, asked = self.processor.image_processor, request.mm_processor_kwargs.max_slice_nums
        if (asked or 0) > images.max_slice_nums:
            raise RequestError(
                f"mm_processor_kwargs.max_slice_nums={asked}: this server cuts an image into {images.max_slice_nums} at most.",
                param="mm_processor_kwargs.max_slice_nums",
            )
        # As if each was asked for in low detail: what is finer is counted when the prompt is written.
        slots = (len(sizes) + videos) * images.image_feature_size
        if all(detail != "low" for detail in _details(request)):
            options = {"max_slice_nums": asked}
            slices = [images.get_number_of_image_patches(height, width, options) for width, height in sizes]
            slots = (sum(slices) + videos) * images.image_feature_size
        if slots >= self.context:
            raise RequestError(
                f"The images and videos of this request take at least {slots} tokens; the context has {self.context}. "
                'Give fewer or smaller ones, or ask for detail "low".',
                code="context_length_exceeded",
            )

    def write(self, request: ChatRequest, messages: list[dict], thinking: bool) -> Prompt:
        """The prompt of a request (messages: of `media.read_messages`).

        Raises:
            RequestError: it cannot be written, or is longer than the context.
        """
        options = request.mm_processor_kwargs.model_dump(exclude_none=True)
        with refusals("messages"):
            messages, options = self._with_details(messages, options)
            settings = self.model.chat_settings(
                self.model,
                self.processor,
                max_inp_length=self.context - 1,
                enable_thinking=thinking,
                decoding="greedy",
                **options,
            )
            settings.template["tools"] = [tool.model_dump(exclude_none=True) for tool in request.usable_tools] or None
            memory = self.model.prompt_memory(self._store.reader(options))
            written = self.model.chat_turn(self.model, self.processor, [messages], settings, memory).prompt
        return Prompt(written.input_ids[0].tolist(), written.keys, written.units)

    def write_plain(self, text: str) -> Prompt:
        """The prompt of a text to go on with; control tokens in it stay text.

        Raises:
            RequestError: it is empty, or longer than the context.
        """
        with refusals("prompt"):
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": text}],
                chat_template=PLAIN_TEMPLATE,
                tokenize=True,
                return_dict=True,
                return_tensors=None,
                max_length=self.context - 1,
            )
        ids = list(inputs["input_ids"][0])
        if not ids:
            raise RequestError("prompt is empty: give a text to go on with", param="prompt")
        return Prompt(ids, ids, [])

    def _with_details(self, messages: list[dict], options: dict) -> tuple[list[dict], dict]:
        """Messages whose images of low detail are not cut into slices, and the options for all of them."""
        details = [
            part.get("detail")
            for message in messages
            for part in message.get("content") or ()
            if part["type"] == "image"
        ]
        if details and all(detail == "low" for detail in details):
            return messages, options | {"max_slice_nums": 1}
        if "low" not in details:
            return messages, options

        def shrunk(part: dict) -> dict:
            if part["type"] != "image" or part["detail"] != "low":
                return part
            image, side = self.processor.load_image(part["image"]), self.processor.image_processor.scale_resolution
            factor = side / math.sqrt(image.width * image.height)
            if factor < 1:
                image = image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))
            return part | {"image": image}

        return [
            message | {"content": [shrunk(part) for part in message["content"]]} if message.get("content") else message
            for message in messages
        ], options


def _details(request: ChatRequest) -> list[str | None]:
    parts = chain.from_iterable(message.content or () for message in request.messages)
    return [part.image_url.detail for part in parts if part.type == "image_url"]


@contextmanager
def refusals(param: str) -> Iterator[None]:
    """What is wrong with messages, images and settings, as errors of the request, in a field of it.

    Raises:
        RequestError: says what it was.
    """
    try:
        yield
    except RequestError:
        raise
    except (ValueError, TypeError, LookupError, RecursionError, TemplateError) as error:
        if not (is_expected(error) or isinstance(error, (TemplateError, RecursionError))):
            raise
        is_long = type(error).__name__ == "PromptTooLongError"
        raise RequestError(str(error), param=param, code="context_length_exceeded" if is_long else None) from error
