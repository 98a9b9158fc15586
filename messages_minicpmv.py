"""Messages of a conversation, and what users may write in them.

What is special:
- A content part is a string, an image or a dict; a string is always text, never a path.
- Where messages become ids, text that a user typed never turns into control tokens (`<image>`, `<|im_end|>`, ...): each
  of them is marked before the template sees it, and the marks are taken out when the prompt is encoded. All other text
  keeps exactly the ids of the whole prompt tokenized at once, as merges cross the borders of its parts.
- A question may name a region for the model to find: the tags around it are real, whatever the name holds.
"""

import dataclasses
import re
from bisect import bisect_right
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer

from .configuration_minicpmv import MiniCPMVError, shorten
from .image_loading_minicpmv import IMAGE_FORMATS, ImageInputError


# Stands after the first character of a control token that a user typed, from the message to the tokenizer. Unicode keeps
# this code point for such uses inside a program.
TYPED = "\ufdd0"
# What an assistant's turn may hold as real tokens, because the model itself writes them.
ASSISTANT_TOKENS = frozenset(
    f"<{slash}{name}>" for name in ("think", "tool_call", "ref", "box", "quad", "point") for slash in ("", "/")
)
IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER = "(<image>./</image>)", "(<video>./</video>)"  # places in a rendered prompt
THINK_START, THINK_END = "<think>", "</think>"
VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".gif"}


def read_message(message: Any, media: dict[str, list], guard: re.Pattern | None = None) -> dict[str, Any]:
    """A message, of the kinds that `MiniCPMVProcessor.apply_chat_template` describes, as the template reads it.

    Its images and videos are appended to `media` (`{"images": list, "videos": list}`). What `guard` finds
    ([`typed_guard`]) is marked as typed; None leaves it. Raises MiniCPMVError where it is no message.
    """
    message = _as_mapping(message)
    if not isinstance(message, Mapping) or "role" not in message:
        raise MiniCPMVError(f"A message is a dict with 'role' and 'content', not {shorten(message)}.")
    allowed = ASSISTANT_TOKENS if message["role"] == "assistant" else frozenset()
    rendered = {
        name: mark_typed(value, guard, allowed if name == "reasoning_content" else frozenset())
        for name, value in message.items()
        if name != "content" and value is not None
    }
    content = message.get("content")
    if content is None:
        return rendered
    if isinstance(content, str):
        return rendered | {"content": mark_typed(content, guard, allowed)}
    parts = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        kind, value = read_part(part)
        if kind == "text":
            text = mark_typed(value, guard, allowed)
            part = _as_mapping(part)
            if isinstance(part, Mapping) and part.get("ref") is not None:
                text += f"<ref>{mark_typed(part['ref'], guard, allowed)}</ref>"
            parts.append({"type": "text", "text": text})
        else:
            # Ours does not, but a template may name the source.
            source = {"url": mark_typed(value, guard, allowed)} if isinstance(value, str) else {}
            parts.append({"type": kind} | source)
            if value is not None:
                media[f"{kind}s"].append(value)
    return rendered | {"content": parts}


def read_part(part: Any) -> tuple[str, Any]:
    """("text" | "image" | "video", value) of one part of a message; value None: it comes by `images=` or `videos=`."""
    part = _as_mapping(part)
    if isinstance(part, str):
        return "text", part
    if isinstance(part, PathLike):
        return "video" if kind_of(part) == "video" else "image", part
    if not isinstance(part, Mapping):
        return "image", part
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    if kind in ("image_url", "video_url"):
        source = part.get(kind)
        source = source.get("url") if isinstance(source, Mapping) else source
        if source is not None:
            return kind.removesuffix("_url"), source
    if kind in ("image", "video"):
        for name in (kind, "url", "path", "base64"):
            if (value := part.get(name)) is not None:
                return kind, f"data:;base64,{value}" if name == "base64" else value
        return kind, None
    kinds = "text, image, image_url, video or video_url with its data"
    raise ImageInputError(f"A content part is a string, an image, or a dict of type {kinds}, not {shorten(part)}.")


def _as_mapping(value: Any) -> Any:
    """Messages and parts that are objects (dataclasses, pydantic models; transformers 5.24 takes them) as dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "model_dump"):
        fields = value.model_dump()
    else:
        return value
    return fields if "role" in fields or "type" in fields else value


def kind_of(path: str | PathLike) -> str | None:
    """ "image" or "video" by the suffix of a file's name, or None for any other."""
    suffix = Path(path).suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "image" if Image.registered_extensions().get(suffix) in IMAGE_FORMATS else None


def split_thought(text: str) -> tuple[str | None, str]:
    """(thought, answer) of what the model wrote; a thought that was never closed is all thought, and where none was
    opened it is None."""
    before, closed, answer = text.partition(THINK_END)
    if THINK_START not in before and not closed:
        return None, text
    thought = before.split(THINK_START, 1)[-1].strip("\n")
    return thought, answer.lstrip("\n")


def write_thought(thought: str) -> str:
    """A thought as the chat template writes it before the answer; "" is the empty one of answers without thinking."""
    return f"{THINK_START}\n{thought}\n{THINK_END}\n\n"


def control_tokens(tokenizer: Any) -> re.Pattern:
    """Pattern of all added tokens of a tokenizer, longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True))))


def typed_guard(tokenizer: Any) -> re.Pattern:
    """Pattern of what must not count where a user typed it: control tokens, and the place of a video, which holds none."""
    return re.compile(f"{re.escape(VIDEO_PLACEHOLDER)}|{control_tokens(tokenizer).pattern}")


def mark_typed(value: Any, guard: re.Pattern | None, allowed: frozenset[str] = frozenset()) -> Any:
    """`value` (text, or lists and dicts of it) with everything that the pattern `guard` finds marked as typed, but for
    the `allowed` tokens; None as guard leaves everything."""
    if guard is None:
        return value
    if isinstance(value, str):
        return guard.sub(lambda found: found[0] if found[0] in allowed else _typed(found[0]), value)
    if isinstance(value, Mapping):
        return {mark_typed(name, guard, allowed): mark_typed(item, guard, allowed) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark_typed(item, guard, allowed) for item in value]
    return value


def encode_prompt(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a prompt, and the (start, end) in `text` of each. Control tokens count, but not those marked as typed.

    Raises MiniCPMVError for text that UTF-8 cannot hold.
    """
    if half := re.search("[\ud800-\udfff]", text):
        what = f"half of a surrogate pair ({half[0]!r}), which is no character"
        raise MiniCPMVError(f"The prompt holds {what}. Decode its text with errors='replace'.")
    if TYPED not in text:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]
    backend = tokenizer.backend_tokenizer
    plain = Tokenizer(backend.model)  # the same vocabulary, in which control tokens are not looked for
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    marked = [_typed(token) for token in (*tokenizer.get_added_vocab(), VIDEO_PLACEHOLDER)]
    typed = re.compile("|".join(map(re.escape, marked)))
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    start = 0
    for match in [*control_tokens(tokenizer).finditer(text), None]:
        stop = match.start() if match else len(text)
        stretch = text[start:stop]
        marks = [found.start() + 1 for found in typed.finditer(stretch)]
        unmarked = "".join(stretch[a:b] for a, b in zip([0, *(m + 1 for m in marks)], [*marks, None], strict=True))
        removed = [mark - index for index, mark in enumerate(marks)]  # where in the unmarked text
        encoding = plain.encode(unmarked, add_special_tokens=False)
        ids += encoding.ids
        offsets += [
            (start + first + bisect_right(removed, first), start + last + bisect_right(removed, last))
            for first, last in encoding.offsets
        ]
        if match:
            ids.append(tokenizer.convert_tokens_to_ids(match[0]))
            offsets.append(match.span())
            start = match.end()
    return ids, offsets


def _typed(token: str) -> str:
    return token[0] + TYPED + token[1:]
