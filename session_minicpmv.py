"""Sessions: a conversation that goes on, and pays in each turn only for what is new.

What is special:
- A turn's prompt is the same as that of a stateless `chat()` over the history, token for token; what both the cache and
  the prompt begin with is not computed again. Thoughts, which the template cuts from the history, go from the cache too.
- A turn happens whole or not at all: an error leaves history and limits as they were. Of a stream that the reader
  closed, the history keeps what was read.
- Tokens and pictures are bounded. A full session drops its oldest turns, and says so, or refuses.
- Histories are saved as JSON beside the pictures, never as pickles.
"""

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from .chat_minicpmv import read_conversations, seeded
from .conversation_cache_minicpmv import ConversationCache, EncodedImage, known_slices
from .image_loading_minicpmv import load_image
from .messages_minicpmv import read_part
from .streaming_minicpmv import AnswerStream, Watch


logger = logging.get_logger(__name__)

HISTORY_FILE = "history.json"
FORMAT = 1  # of that file
# A full session is emptied to this share of its limits, since whatever is kept has to be computed again.
KEPT_SHARE = 0.75


class SessionFullError(ValueError):
    """A turn does not fit into the limits of its session."""


class SessionBusyError(RuntimeError):
    """A session is asked for something while it is still answering."""


class SessionFileError(ValueError):
    """A folder is not a saved history, or stands where one should be saved."""


class ChatSession:
    """A conversation with its key-value cache and encoded pictures; made by `model.start_chat`.

    A session belongs to one thread at a time; several sessions of one model may run in several threads.
    """

    def __init__(self, model, processor, messages, max_tokens, max_pictures, when_full, options):
        self.model, self.processor = model, processor
        self.max_tokens, self.max_pictures, self.when_full = max_tokens, max_pictures, when_full
        self.dropped_turns = 0  # since the beginning
        self._first_messages, self._messages = messages, list(messages)
        self._options = options
        self._memory = ConversationCache()
        self._busy = threading.Lock()

    @property
    def history(self):
        """The messages so far, as a list for `chat(msgs=...)`; thoughts are not among them."""
        return _copies(self._messages)

    @property
    def cached_tokens(self):
        """Tokens whose states are kept."""
        return len(self._memory.keys)

    def send(self, content, *, stream=False, **options):
        """Ask, and add question and answer to the history.

        Args:
            content: text, a picture, or a list of parts, as in a message of `chat()`.
            stream: return an [`AnswerStream`] instead. Until it is read to its end or closed, the session is busy.
            options: those of `chat()` that concern one answer (enable_thinking, thinking_budget, max_new_tokens,
                sampling, seed, temperature, ...), over those of `start_chat`.

        Returns:
            [`ChatOutput`]; `str()` of it is the text.

        Raises:
            SessionFullError: the turn does not fit, even without the turns before it; or `when_full` is "error".
            SessionBusyError: a stream is still open.
            TypeError, ValueError: as `chat()`.
        """
        watch = Watch()
        self._take()
        try:
            for name in options:
                if self.processor.is_option(name) or name in ("max_inp_length", "temporal_ids"):
                    raise TypeError(
                        f"{name!r} concerns the whole conversation: give it to start_chat()"
                        + (" as max_tokens." if name == "max_inp_length" else ".")
                    )
            settings = self.model._read_settings(self.processor, **{**self._options, **options, "stream": stream})
            question = _snapshot({"role": "user", "content": content})
            messages, answer, units, dropped = self._make_room([*self._messages, question], settings)
        except BaseException:
            self._busy.release()
            raise
        watch.note("inputs")

        def run(watch, streamer=None):
            with seeded(settings.seed, self.model.device):
                (output,) = answer(watch, streamer)
            output.dropped_turns = dropped
            return [output]

        def finish(output):
            if output is not None:
                self._messages = [*messages, {"role": "assistant", "content": output.text}]
                self.dropped_turns += dropped
                self._memory.keep_only(units)
            self._busy.release()

        if stream:
            return AnswerStream(run, watch, self.processor.tokenizer, finish)
        output = None
        try:
            (output,) = run(watch)
        finally:
            finish(output)
        return output

    def _make_room(self, messages, settings):
        """Drop oldest turns until prompt and answer fit. Returns the messages, the function that answers them, their
        visual units and the number of turns that were dropped."""
        system, turns = _split_turns(messages)
        dropped, share = 0, 1.0
        while True:
            kept = [*system, *(message for turn in turns[dropped:] for message in turn)]
            prompt, answer = self.model._prepare_turn(self.processor, kept, settings, self._memory)
            tokens, pictures = len(prompt.ids) + settings.max_new_tokens, _count_pictures(kept)
            if tokens <= share * self.max_tokens and pictures <= share * self.max_pictures:
                break
            is_last = dropped + 1 == len(turns)
            if is_last and tokens <= self.max_tokens and pictures <= self.max_pictures:
                break
            if is_last or self.when_full == "error":
                raise SessionFullError(
                    f"With this turn the conversation needs {tokens} tokens ({len(prompt.ids)} to read, "
                    f"max_new_tokens={settings.max_new_tokens} to write) and {pictures} pictures; the session has room for "
                    f"max_tokens={self.max_tokens} and max_pictures={self.max_pictures}. Lower max_new_tokens, start a "
                    "session with higher limits, or "
                    + ("give less." if is_last else 'let it drop old turns (when_full="drop").')
                )
            dropped, share = dropped + 1, KEPT_SHARE
        if dropped:
            logger.warning(
                f"The session is full (max_tokens={self.max_tokens}, max_pictures={self.max_pictures}): its oldest "
                f"{dropped} turns were dropped."
            )
        return kept, answer, prompt.units, dropped

    def reset(self):
        """Go back to the beginning: the history that the session started with."""
        with self._alone():
            self._messages, self._memory, self.dropped_turns = list(self._first_messages), ConversationCache(), 0

    def undo(self):
        """Take back the last turn; returns the content of its question, for example to send it again."""
        with self._alone():
            system, turns = _split_turns(self._messages)
            if not turns:
                raise ValueError("There is no turn to take back.")
            self._messages = [*system, *(message for turn in turns[:-1] for message in turn)]
            return turns[-1][0]["content"]

    def fork(self):
        """Another session that goes on from here. What is computed is shared, and neither changes the other."""
        with self._alone():
            other = ChatSession(
                self.model,
                self.processor,
                self._first_messages,
                self.max_tokens,
                self.max_pictures,
                self.when_full,
                self._options,
            )
            other._messages, other.dropped_turns = list(self._messages), self.dropped_turns
            other._memory = self._memory.fork()
            return other

    def save(self, folder):
        """Save the history: `history.json`, pictures as PNG, videos as they are, named by their content. An older one in
        `folder` is replaced; other files there stay.

        Raises:
            SessionFileError: `folder` holds something else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / HISTORY_FILE).is_file() and (folder.is_file() or any(folder.iterdir())):
            raise SessionFileError(f"{str(folder)!r} exists and is no saved history. Choose another folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with self._alone(), tempfile.TemporaryDirectory(dir=folder.parent) as new:
            messages = [_stored_message(message, Path(new)) for message in self._messages]
            text = json.dumps({"format": FORMAT, "messages": messages}, ensure_ascii=False, indent=2)
            older = _media_files(folder)
            folder.mkdir(exist_ok=True)
            for file in list(Path(new).iterdir()):
                if file.name in older:
                    older.remove(file.name)
                else:
                    os.replace(file, folder / file.name)
            # Last, so that whoever is interrupted before still has the older history.
            (Path(new) / HISTORY_FILE).write_text(text + "\n", encoding="utf-8")
            os.replace(Path(new) / HISTORY_FILE, folder / HISTORY_FILE)
            for name in older:
                (folder / name).unlink()

    def _take(self):
        if not self._busy.acquire(blocking=False):
            raise SessionBusyError(
                "The session is still answering. Read its stream to the end or close() it; use fork() or a session of "
                "its own for each thread."
            )

    @contextmanager
    def _alone(self):
        self._take()
        try:
            yield
        finally:
            self._busy.release()


class SessionMixin:
    """Adds sessions, and pictures that are encoded once, to a model that has `chat`."""

    def start_chat(
        self,
        processor=None,
        *,
        system_prompt="",
        history=None,
        max_tokens=None,
        max_pictures=32,
        when_full="drop",
        **options,
    ):
        """Start a [`ChatSession`].

        Args:
            processor: that in the model's own folder where it is not given.
            system_prompt: stands in front of the conversation.
            history: messages to go on from.
            max_tokens: most tokens of prompt and answer together, and so of the cache: 16384, or what the model's
                positions allow.
            max_pictures: most pictures and clips in the history.
            when_full: "drop" the oldest turns (a warning and `ChatOutput.dropped_turns` tell), or raise an "error".
            options: those of `chat()`, for every turn: max_slice_nums, fps, enable_thinking, max_new_tokens, ...
        """
        processor = self._chat_processor(processor, None)
        limit = self.config.max_position_embeddings
        max_tokens = min(16384, limit) if max_tokens is None else max_tokens
        for name, value, most in (("max_tokens", max_tokens, limit), ("max_pictures", max_pictures, None)):
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or value < 0
                or (most is not None and value > most)
            ):
                raise ValueError(f"{name}={value!r} has to be a number from 0{'' if most is None else f' to {most}'}.")
        if when_full not in ("drop", "error"):
            raise ValueError(f"when_full={when_full!r} does not exist: choose 'drop' or 'error'.")
        for name in (
            "max_inp_length",
            "temporal_ids",
            "cache_implementation",
            "use_cache",
            "past_key_values",
            "cache",
            "stream",
        ):
            if name in options:
                raise TypeError(
                    f"{name!r} is no option of a session: it bounds its prompts by max_tokens, takes clips as videos, "
                    "streams by send(stream=True), and keeps a dynamic cache of its own."
                )
        self._read_settings(processor, **options)
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        if history:
            (conversation,), _ = read_conversations(history)
            messages += _snapshot(conversation)
        return ChatSession(self, processor, messages, max_tokens, max_pictures, when_full, options)

    def load_chat(self, folder, processor=None, **options):
        """Start a session from a history that `ChatSession.save` wrote; `options` as for `start_chat`.

        Raises:
            SessionFileError: the folder holds no history, or one that names files outside of it.
        """
        folder = Path(folder)
        messages = _stored_messages(folder)
        session = self.start_chat(processor, **options)
        session._messages = [_loaded_message(message, folder) for message in messages]
        session._first_messages = list(session._messages)
        return session

    @torch.no_grad()
    def encode_images(self, images, processor=None, max_slice_nums=None):
        """Read pictures once, to ask about them many times.

        Args:
            images: a picture, or a list of pictures.
            processor: that in the model's own folder where it is not given.
            max_slice_nums: see `MiniCPMVProcessor.__call__`; calls that use the pictures need the same.

        Returns:
            [`EncodedImage`], for a list a list of them: they stand in messages of this model as pictures do.
        """
        processor = self._chat_processor(processor, None)
        is_one = not isinstance(images, (list, tuple))
        images = [images] if is_one else list(images)
        sliced = [known_slices(s) for s in processor.image_processor.slice_all_to_patches(images, max_slice_nums)]
        units = [[((-1,), part) for part in picture.pixel_values] for picture in sliced]
        memory = ConversationCache()
        memory.encode([unit for picture in units for unit in picture], self)
        encoded = [
            EncodedImage(image, picture, {(self, unit): memory.features[self, unit] for unit in own})
            for image, picture, own in zip(images, sliced, units, strict=True)
        ]
        return encoded[0] if is_one else encoded


def _split_turns(messages):
    """System messages at the beginning, and the turns: lists of messages that begin with a user's."""
    start = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns = []
    for message in messages[start:]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return messages[:start], turns


def _parts(message):
    content = message.get("content")
    return list(content) if isinstance(content, (list, tuple)) else [] if content is None else [content]


def _snapshot(given):
    """Messages as they are now: what is read again in a later turn must not have changed, such as the array of a camera."""
    if isinstance(given, Mapping):
        return {name: _snapshot(value) for name, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [_snapshot(value) for value in given]
    for copy in ("clone", "copy"):  # tensors; arrays, pictures and bytearrays
        if hasattr(given, copy):
            return getattr(given, copy)()
    return given


def _copies(messages):
    """Messages whose lists a caller may change; pictures and texts are the same."""
    return [
        {name: list(value) if isinstance(value, list) else value for name, value in message.items()}
        for message in messages
    ]


def _count_pictures(messages):
    return sum(read_part(part)[0] != "text" for message in messages for part in _parts(message))


# ---- files of a history ----


def _stored_message(message, folder):
    """A message as JSON; its pictures and videos are written to `folder`."""
    stored = {name: value for name, value in message.items() if name != "content"}
    if isinstance(message.get("content"), str):
        return stored | {"content": message["content"]}
    parts = []
    for part in _parts(message):
        kind, value = read_part(part)
        parts.append({"type": kind, kind: value if kind == "text" else _store(kind, value, folder)})
        if isinstance(part, Mapping) and "ref" in part:
            parts[-1]["ref"] = part["ref"]
    return stored | {"content": parts}


def _store(kind, value, folder):
    """Write a picture or video; returns its file name, or the list of the names of its frames."""
    if kind == "image":
        load_image(value.image if isinstance(value, EncodedImage) else value).save(folder / "new.png")
        return _named_by_content(folder / "new.png")
    if isinstance(value, (str, os.PathLike)) and Path(value).is_file():
        file = folder / f"new{Path(value).suffix}"
        shutil.copyfile(value, file)
        return _named_by_content(file)
    if isinstance(value, (bytes, bytearray)):
        (folder / "new.video").write_bytes(value)
        return _named_by_content(folder / "new.video")
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", None) == 4:
        return [_store("image", frame, folder) for frame in value]
    raise SessionFileError(f"A video given as {type(value).__name__} cannot be saved: give a path, bytes or frames.")


def _named_by_content(file):
    """Rename a file; returns its name. A session that was loaded goes on reading its files after others were saved
    beside them, so one name must never stand for two pictures."""
    name = hashlib.sha256(file.read_bytes()).hexdigest()[:16] + file.suffix
    os.replace(file, file.with_name(name))
    return name


def _stored_messages(folder):
    """The messages of a saved history, as JSON.

    Raises:
        SessionFileError: there is none.
    """
    try:
        stored = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SessionFileError(f"{str(folder)!r} holds no saved history ({error}).") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not isinstance(stored.get("messages"), list):
        raise SessionFileError(f"{HISTORY_FILE} in {str(folder)!r} is not a history of format {FORMAT}.")
    return stored["messages"]


def _media_files(folder):
    """Names of the pictures and videos of the history in a folder; none where there is no history that can be read."""
    try:
        messages = [_loaded_message(message, folder) for message in _stored_messages(folder)]
    except SessionFileError:
        return set()
    parts = [read_part(part) for message in messages for part in _parts(message)]
    files = [value if isinstance(value, list) else [value] for kind, value in parts if kind != "text"]
    return {Path(file).name for names in files for file in names}


def _loaded_message(message, folder):
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
        raise SessionFileError(
            f"{HISTORY_FILE} in {str(folder)!r} holds something that is no message: {message!r:.80}."
        )
    content = message.get("content")
    return message | {"content": [_load(part, folder) for part in content] if isinstance(content, list) else content}


def _load(part, folder):
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if kind in ("text", "image", "video") else None
    if kind == "text" and isinstance(value, str):
        return part
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise SessionFileError(f"{HISTORY_FILE} names {name!r}, which is no file in {str(folder)!r}.")
    files = [str(folder / name) for name in names]
    return {"type": kind, kind: files if isinstance(value, list) else files[0]}
