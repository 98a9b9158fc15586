"""Rows as other software writes them -> conversation rows.

A conversation row is `{"messages": [...]}`, for preferences `{"prompt", "chosen", "rejected"}`, or `{"prompt"}` alone. A
message is `{"role", "content"}`, its content a list of parts: `{"type": "text", "text"}`, with the name of a region as `"ref"`
where it asks for one, `{"type": "image", "image"}`, `{"type": "video", "video"}`. All other columns of a row stay as they are.

What is special:
- A row of any format becomes the same, a conversation row itself included: formats are told apart by their columns.
- Images stand where a mark (`<image>`, `<image_00>`, `<video>`) or an empty part of their type is, or in front of the
  first question when there is neither. Marks and images that do not agree make the row bad.
- Text stays as it is, but for line breaks where the chat template puts its own: beside a mark, before an answer.
- What the chat template would lose (a thought without an end, words before a thought) makes the row bad as well.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from minicpmv.errors import MiniCPMVError


# A thought in a text, as rows hold it and as the chat template writes it.
THINK_START, THINK_END = "<think>", "</think>"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
MARKS = {"image": re.compile(r"<image(?:_\d+)?>"), "video": re.compile(r"<video(?:_\d+)?>")}
MEDIA_COLUMNS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
# In these formats `<image>` is a mark even where the row brings no image; elsewhere it is then what a user typed.
MARKED_COLUMNS = {"conversations", "query", "instruction"}
CONVERSATION_COLUMNS = {"messages", "conversations", "prompt", "completion", "chosen", "rejected", "rejected_response"}
CONVERSATION_COLUMNS |= {"query", "response", "history", "instruction", "input", "output", "system"}
UNSUPPORTED_COLUMNS = ("tools", "audio", "audios", "rejected_messages", "rejected_images")
# Line breaks that would melt into those of the prompt: the model would be trained on other ids than it is asked with.
# (The template takes away bare ones around a thought.)
LEADING_BREAKS = re.compile(r"\A\s*\n|(?<=think>)\n*[^\S\n]\s*\n")


class DataError(MiniCPMVError):
    """Rows, or a source of rows, that cannot be used: the message says why."""


class BadRowError(DataError):
    """A row that cannot be used: the message says which row and why. `index` is its number in the source, if known."""

    def __init__(self, message: str, index: int | None = None):
        super().__init__(message)
        self.index = index

    def __reduce__(self):  # data loader workers send it to the trainer
        return type(self), (str(self), self.index)


def conversation_row(row: Mapping[str, Any], folder: str | os.PathLike | None = None) -> dict[str, Any]:
    """Bring one row of any known format into the form of this module; such a row comes back equal.

    Args:
        row: mapping with the columns of the row; None counts as absent.
        folder: where relative paths of images and videos begin; None leaves them.

    Returns:
        dict: the conversation, and all other columns. With `train_on`: "last" where a prompt had its completion.

    Raises:
        BadRowError: what makes the row unusable.
    """
    if not isinstance(row, Mapping):
        raise BadRowError(f"a row is a mapping of columns, not {_short(row)}")
    row = {name: value for name, value in row.items() if value is not None}
    for name in UNSUPPORTED_COLUMNS:
        if row.get(name):
            raise BadRowError(f"column {name!r} is not supported; remove it")
    conversation = {
        column: [_read_message(message, folder) for message in messages]
        for column, messages in _read_columns(row).items()
    }
    messages = next(iter(conversation.values()))  # the only ones that may hold images
    for kind in ("video", "image"):  # in front of a question images come first, so they are put there last
        columns = [name for name, its_kind in MEDIA_COLUMNS.items() if its_kind == kind and name in row]
        media = [item for name in columns for item in _read_media(row[name], kind, folder)]
        _place(messages, kind, media, has_marks=bool(columns or row.keys() & MARKED_COLUMNS))
    rest = {name: row[name] for name in row if name not in CONVERSATION_COLUMNS and name not in MEDIA_COLUMNS}
    if "id" in rest:
        rest["id"] = str(rest["id"])
    if "completion" in row:
        rest["train_on"] = "last"
    _check(conversation, rest)
    return conversation | rest


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message as the chat template renders it."""
    return "\n".join(_with_ref(part) for part in message["content"] if part["type"] == "text")


def _with_ref(part):
    """The text of a part, and the name of the region that it asks for."""
    return part["text"] if part.get("ref") is None else f"{part['text']}<ref>{part['ref']}</ref>"


def has_thought(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message begins with a thought."""
    thought, end, _ = text_of(message).partition(THINK_END)
    return bool(end) and bool(thought.replace(THINK_START, "").strip("\n"))


# ---- columns -> messages ----


def _read_columns(row):
    """`{"messages"}`, `{"prompt", "chosen", "rejected"}` or `{"prompt"}`, each a list of messages as they were given."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if (chosen is None) != (rejected is None):
        raise BadRowError("a preference needs both columns, 'chosen' and 'rejected'")
    name = next(
        (name for name in ("messages", "conversations", "prompt", "query", "instruction") if name in row), None
    )
    if name in ("messages", "conversations", "prompt"):
        messages = _as_messages(row[name], "user")
    elif name is not None:
        messages = _read_question(row)
    elif chosen is not None:
        messages, chosen, rejected = _split_prompt(chosen, rejected)
    else:
        raise BadRowError(
            f"no conversation in the columns {sorted(row)}; give 'messages', 'conversations', 'prompt' with 'completion' "
            "or 'chosen' and 'rejected', 'query' with 'response', or 'instruction' with 'output'"
        )
    if "system" in row:
        messages = [{"role": "system", "content": row["system"]}, *messages]
    if chosen is not None:
        chosen, rejected = _as_messages(chosen, "assistant"), _as_messages(rejected, "assistant")
        return {"prompt": messages, "chosen": chosen, "rejected": rejected}
    if "rejected_response" in row:
        rejected = _as_messages(row["rejected_response"], "assistant")
        return {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}
    if "completion" in row:
        completion = _as_messages(row["completion"], "assistant")
        if len(completion) != 1:
            raise BadRowError(f"'completion' has {len(completion)} messages; give one answer, or all as 'messages'")
        return {"messages": [*messages, *completion]}
    return {"prompt" if name == "prompt" else "messages": messages}


def _read_question(row):
    """Messages of `query`, `response` (ms-swift) or `instruction`, `input`, `output` (Alpaca), with their `history`."""
    question = [row[name] for name in ("query", "instruction", "input") if row.get(name)]
    if not all(isinstance(text, str) for text in question):
        raise BadRowError(f"a question is text, not {_short(question)}")
    history = row.get("history", [])
    if not isinstance(history, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history
    ):
        raise BadRowError(f"'history' is a list of [question, answer], not {_short(history)}")
    pairs = [*history, ("\n".join(question), row.get("response", row.get("output")))]
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return messages[:-1] if messages[-1]["content"] is None else messages


def _split_prompt(chosen, rejected):
    """The messages that both begin with, and the rest of each."""
    chosen, rejected = _as_messages(chosen, "assistant"), _as_messages(rejected, "assistant")
    length = next(
        (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if not 0 < length < min(len(chosen), len(rejected)):
        raise BadRowError(
            "without 'prompt', 'chosen' and 'rejected' are whole conversations that begin alike and end differently; "
            f"these have {length} messages in common, of {len(chosen)} and {len(rejected)}"
        )
    return chosen[:length], chosen[length:], rejected[length:]


def _as_messages(value, role):
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, (list, tuple)) and value:
        return list(value)
    raise BadRowError(f"a conversation is a list of messages, not {_short(value)}")


# ---- messages and media ----


def _read_message(message, folder):
    if not isinstance(message, Mapping):
        raise BadRowError(f"a message is a mapping with 'role' and 'content', not {_short(message)}")
    given = {name: value for name, value in message.items() if value is not None and not _is_empty_list(value)}
    names = {part: [name for name in pair if name in given] for part, pair in _MESSAGE_KEYS.items()}
    for part, found in names.items():
        if len(found) > 1 or (not found and part != "thought"):
            raise BadRowError(
                f"a message has one of {' and '.join(map(repr, _MESSAGE_KEYS[part]))}: {_short(message)}"
            )
    role, content = (given.pop(names[part][0]) for part in ("role", "content"))
    thought = given.pop(names["thought"][0]) if names["thought"] else None
    if role not in ROLES:
        raise BadRowError(f"role {role!r} is not supported; roles are {', '.join(ROLES)}")
    if given:
        raise BadRowError(f"a message's {', '.join(map(repr, given))} is not supported; remove it")
    items = content if isinstance(content, (list, tuple)) else [content]
    parts = [_read_part(item, folder) for item in items]
    if ROLES[role] == "assistant":
        parts = [{"type": "text", "text": _read_answer(parts, thought)}]
    elif thought is not None:
        raise BadRowError(f"a thought belongs to the assistant, not to the role {role!r}")
    return {"role": ROLES[role], "content": parts}


_MESSAGE_KEYS = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "thought": ("reasoning_content", "thinking"),
}


def _read_answer(parts, thought):
    """An assistant's text with its thought, checked for what the chat template would lose."""
    if any(part["type"] != "text" for part in parts):
        raise BadRowError("an assistant's message holds an image or video; the model writes text only")
    if any("ref" in part for part in parts):
        raise BadRowError("a ref belongs to a question; write <ref>name</ref> into the text of an answer")
    text = "\n".join(part["text"] for part in parts)
    if thought is not None:
        text = f"{THINK_START}\n{thought}\n{THINK_END}\n\n{text}"
    text = LEADING_BREAKS.sub("", text)
    starts, ends = text.count(THINK_START), text.count(THINK_END)
    begins = text.lstrip().startswith(THINK_START)
    if begins and not ends:
        raise BadRowError(f"the thought of an answer has no end, </think>: {_short(text)}")
    if ends and not (begins and starts == ends == 1):
        raise BadRowError(f"an answer has at most one thought, <think>...</think>, and begins with it: {_short(text)}")
    if not text.strip():
        raise BadRowError("an assistant's message is empty")
    return text


def _read_part(item, folder):
    if isinstance(item, str):
        return {"type": "text", "text": item}
    if isinstance(item, bytes) or _is_image(item):
        return {"type": "image", "image": _read_medium(item, "image", folder)}
    if not isinstance(item, Mapping):
        raise BadRowError(f"a message's content is text or a list of parts, not {_short(item)}")
    kind = str(item.get("type")).removesuffix("_url")
    if item.get("type") == "text" and isinstance(item.get("text"), str):
        ref = item.get("ref")
        if not isinstance(ref, str | None):
            raise BadRowError(f"the ref of a part is the name of what to find, a text, not {_short(ref)}")
        return {"type": "text", "text": item["text"]} | ({} if ref is None else {"ref": ref})
    if kind not in MARKS:
        raise BadRowError(f"a part of a message is text or has the type text, image or video, not {_short(item)}")
    names = (f"{kind}_url",) if kind != item["type"] else (kind, "url", "path", "base64")
    name = next((name for name in names if item.get(name) is not None), None)
    if name is None:
        return {"type": kind}
    value = item[name]
    if name == f"{kind}_url" and isinstance(value, Mapping):
        value = value.get("url")
    if name == "base64":
        value = f"data:;base64,{value}"
    return {"type": kind, kind: _read_medium(value, kind, folder)}


def _read_media(value, kind, folder):
    """[(mark or None, image or video)] of a column."""
    if isinstance(value, Mapping) and not value.keys() <= {"bytes", "path"}:
        if not all(MARKS[kind].fullmatch(mark) for mark in value):
            raise BadRowError(f"the keys of several {kind}s are their marks, <{kind}_00> and so on, not {list(value)}")
        return [(mark, _read_medium(item, kind, folder)) for mark, item in value.items() if item is not None]
    items = value if isinstance(value, (list, tuple)) else [value]
    return [(None, _read_medium(item, kind, folder)) for item in items]


def _read_medium(value, kind, folder):
    """An image as `{"bytes", "path"}` (or the object itself when it is loaded already), a video as its path."""
    data = None
    if isinstance(value, Mapping):
        data, value = value.get("bytes"), value.get("path")
    if kind == "image" and isinstance(value, (bytes, bytearray)):
        data, value = bytes(value), None
    if kind == "image" and isinstance(value, str) and value.startswith("data:"):
        data, value = _decode_data_url(value), None
    if kind == "image" and data is not None:
        return {"bytes": data, "path": value}
    if isinstance(value, (str, os.PathLike)) and str(value):
        path = os.fspath(value)
        if folder is not None and "://" not in path:
            path = os.path.join(folder, path)  # an absolute path stays
        return {"bytes": None, "path": path} if kind == "image" else path
    if kind == "image" and _is_image(value):
        return value
    accepted = "a path, bytes, a data URL or an image" if kind == "image" else "a path; give frames as images"
    raise BadRowError(f"{_short(value)} is not {'an image' if kind == 'image' else 'a video'}; give {accepted}")


def _is_image(value):
    return isinstance(value, Image.Image) or hasattr(value, "__array__")


def _decode_data_url(url):
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise BadRowError(f"the data URL {_short(url)} does not begin with data:image/...;base64,")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise BadRowError(f"the data URL {_short(url)} is not valid base64: {error}") from error


def _place(messages, kind, media, has_marks):
    """Put images (or videos) into their places."""
    texts = [
        part for message in messages if message["role"] != "assistant" for part in message["content"] if "text" in part
    ]
    places = [part for message in messages for part in message["content"] if part["type"] == kind and kind not in part]
    marks = [mark for part in texts for mark in MARKS[kind].findall(part["text"])] if has_marks and not places else []
    names = [f"<{kind}>" if name is None else name for name, _ in media]
    if marks and sorted(marks) != sorted(names):
        raise BadRowError(f"the text has the marks {marks}, but the row brings {kind}s for {names}; they must agree")
    if places and len(places) != len(media):
        raise BadRowError(f"the messages have {len(places)} places for {kind}s, but the row brings {len(media)}")
    if places:
        for place, (_, value) in zip(places, media, strict=True):
            place[kind] = value
    elif marks:
        waiting = {}
        for name, (_, value) in zip(names, media, strict=True):
            waiting.setdefault(name, []).append(value)
        for message in messages:
            if message["role"] != "assistant":
                message["content"] = [
                    new for part in message["content"] for new in _split_at_marks(part, kind, waiting)
                ]
    elif media:
        question = next((message for message in messages if message["role"] == "user"), None)
        if question is None:
            raise BadRowError(f"the row brings {len(media)} {kind}s, but there is no question to put them in front of")
        question["content"][:0] = [{"type": kind, kind: value} for _, value in media]


def _split_at_marks(part, kind, waiting):
    if part["type"] != "text":
        return [part]
    text, parts, start = part["text"], [], 0
    for mark in [*MARKS[kind].finditer(text), None]:
        piece = text[start : mark.start() if mark else None]
        piece = piece.removeprefix("\n") if start else piece
        piece = piece.removesuffix("\n") if mark else piece
        parts += [{"type": "text", "text": piece}] if piece else []
        if mark:
            parts.append({"type": kind, kind: waiting[mark[0]].pop(0)})
            start = mark.end()
    if "ref" in part:  # it follows the text
        last = parts.pop() if parts and parts[-1]["type"] == "text" else {"type": "text", "text": ""}
        parts.append(last | {"ref": part["ref"]})
    return parts


def _check(conversation, options):
    messages = next(iter(conversation.values()))
    if not any(message["role"] == "user" for message in messages):
        raise BadRowError("the conversation has no user's message")
    for column, part in conversation.items():
        asked = "user" if column == "prompt" else "assistant"
        if part[-1]["role"] != asked:
            raise BadRowError(f"the last message of {column!r} is the {part[-1]['role']}'s; it must be the {asked}'s")
    for column in conversation.keys() & {"chosen", "rejected"}:
        if conversation[column][0]["role"] != "assistant":
            raise BadRowError(
                f"{column!r} begins with a question; beside 'prompt' it holds only what follows the prompt"
            )
    if "messages" in conversation and options.get("enable_thinking") not in (None, has_thought(messages[-1])):
        raise BadRowError(
            f"enable_thinking is {options['enable_thinking']}, but the last answer has "
            f"{'a' if has_thought(messages[-1]) else 'no'} thought; leave it out, the answer decides"
        )


def _is_empty_list(value):
    return isinstance(value, list) and not value


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
