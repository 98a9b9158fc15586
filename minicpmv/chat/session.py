"""Sessions: a conversation that goes on, and pays in each turn only for what is new.

What is special:
- A turn's prompt is the same as that of a stateless `chat()` over the history, token for token; what both the cache and
  the prompt begin with is not computed again. Thoughts, which the template cuts from the history, go from the cache too.
- A turn happens whole or not at all: an error leaves history and limits as they were. Of a stream that the reader
  closed, the history keeps what was read.
- Tokens and images are bounded. A full session drops its oldest turns, and says so, or refuses.
"""

import copy
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

from minicpmv.chat.cache import MediaCache
from minicpmv.chat.history import load_history, save_history
from minicpmv.errors import MiniCPMVError


logger = logging.getLogger(__name__)

MAX_TOKENS = 16384  # of a session, where the model's positions allow it
# A full session is emptied to this share of its limits, since whatever is kept has to be computed again.
KEPT_SHARE = 0.75
OF_NO_SESSION = (
    "max_inp_length",
    "temporal_ids",
    "cache_implementation",
    "use_cache",
    "past_key_values",
    "cache",
    "stream",
)


class SessionError(MiniCPMVError):
    """A session is asked for something that it cannot do."""


class SessionFullError(SessionError):
    """A turn does not fit into the limits of its session."""


class SessionBusyError(SessionError):
    """A session is asked for something while it is still answering."""


class ChatSession:
    """A conversation with its key-value cache and encoded images.

    A session belongs to one thread at a time; several sessions of one model may run in several threads.

    Args:
        model, processor: a MiniCPM-V and its processor; that in the model's own folder where it is None.
        system_prompt: stands in front of the conversation.
        history: messages to go on from, in any form that `chat()` takes.
        max_tokens: most tokens of prompt and answer together, and so of the cache: 16384, or what the model's positions
            allow.
        max_media: most images and videos in the history.
        when_full: "drop" the oldest turns (a warning and `ChatOutput.dropped_turns` tell), or raise an "error".
        options: those of `chat()`, for every turn: max_slice_nums, fps, enable_thinking, max_new_tokens, ...

    Raises:
        SessionError: a limit that does not exist.
        TypeError, ValueError: as `chat()`.
    """

    def __init__(
        self,
        model,
        processor=None,
        *,
        system_prompt: str = "",
        history: Sequence | str | None = None,
        max_tokens: int | None = None,
        max_media: int = 32,
        when_full: str = "drop",
        **options,
    ):
        processor = model.chat_processor(processor)
        limit = model.config.max_position_embeddings
        max_tokens = min(MAX_TOKENS, limit) if max_tokens is None else max_tokens
        for name, value, most in (("max_tokens", max_tokens, limit), ("max_media", max_media, None)):
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if not is_number or value < 0 or (most is not None and value > most):
                raise SessionError(
                    f"{name}={value!r} has to be a number from 0{'' if most is None else f' to {most}'}."
                )
        if when_full not in ("drop", "error"):
            raise SessionError(f"when_full={when_full!r} does not exist: choose 'drop' or 'error'.")
        for name in OF_NO_SESSION:
            if name in options:
                raise TypeError(
                    f"{name!r} is no option of a session: it bounds its prompts by max_tokens, takes frames as videos, "
                    "streams by send(stream=True), and keeps a dynamic cache of its own."
                )
        model.chat_settings(model, processor, **options)  # refuses what does not exist
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        if history:
            (conversation,), _ = model.read_conversations(history)
            messages += _snapshot(conversation)
        self.model, self.processor = model, processor
        self.max_tokens, self.max_media, self.when_full = max_tokens, max_media, when_full
        self.dropped_turns = 0  # since the beginning
        self._first_messages, self._messages = messages, list(messages)
        self._options = options
        self._memory = model.prompt_memory(MediaCache())
        self._busy = threading.Lock()

    @classmethod
    def load(cls, folder: str | PathLike, model, processor=None, **options) -> "ChatSession":
        """A session that goes on from a history which `save` wrote; `options` as of a new one.

        Raises:
            HistoryError: the folder holds no history, or one that names files which are not its own.
        """
        messages = load_history(folder)
        session = cls(model, processor, **options)
        session._first_messages = [*session._first_messages, *messages]
        session._messages = list(session._first_messages)
        return session

    @property
    def history(self) -> list[dict]:
        """The messages so far, as a list for `chat(msgs=...)`; thoughts are not among them."""
        return [
            {name: list(value) if isinstance(value, list) else value for name, value in message.items()}
            for message in self._messages
        ]

    @property
    def cached_tokens(self) -> int:
        """Tokens whose states are kept."""
        return len(self._memory.keys)

    def send(self, content: Any, *, stream: bool = False, **options: Any) -> Any:
        """Ask, and add question and answer to the history.

        Args:
            content: text, an image, or a list of parts, as in a message of `chat()`.
            stream: return an `AnswerStream` instead. Until it is read to its end or closed, the session is busy.
            options: those of `chat()` that concern one answer (enable_thinking, thinking_budget, max_new_tokens,
                decoding, seed, temperature, ...), over those of the session.

        Returns:
            `ChatOutput`; `str()` of it is the text.

        Raises:
            SessionFullError: the turn does not fit, even without the turns before it; or `when_full` is "error".
            SessionBusyError: a stream is still open.
            TypeError, ValueError: as `chat()`.
        """
        self._take()
        try:
            for name in options:
                if self.processor.is_option(name) or name in ("max_inp_length", "temporal_ids"):
                    raise TypeError(
                        f"{name!r} concerns the whole conversation: give it to ChatSession()"
                        + (" as max_tokens." if name == "max_inp_length" else ".")
                    )
            of_all = dict(self._options)
            if options.keys() & {"decoding", "sampling"}:  # two names of one choice
                of_all = {name: value for name, value in of_all.items() if name not in ("decoding", "sampling")}
            settings = self.model.chat_settings(self.model, self.processor, **{**of_all, **options, "stream": stream})
            question = _snapshot({"role": "user", "content": content})
            messages, turn, dropped = self._make_room([*self._messages, question], settings)
        except BaseException:
            self._busy.release()
            raise

        def finish(output):
            if output is not None:
                output.dropped_turns = dropped
                self._messages = [*messages, {"role": "assistant", "content": output.text}]
                self.dropped_turns += dropped
                self._memory.media_cache.keep_only(turn.prompt.units)
            self._busy.release()

        if stream:
            return self.model.answer_stream(turn, finish)
        output = None
        try:
            (output,) = turn.run()
        finally:
            finish(output)
        return output

    def _make_room(self, messages: list[dict], settings) -> tuple[list[dict], Any, int]:
        """Drop oldest turns until prompt and answer fit. Returns the messages, the turn that answers them, and the number
        of turns that were dropped."""
        system, turns = _split_turns(messages)
        dropped, share = 0, 1.0
        while True:
            kept = [*system, *(message for turn in turns[dropped:] for message in turn)]
            turn = self.model.chat_turn(self.model, self.processor, [kept], settings, self._memory)
            length = turn.prompt.input_ids.shape[1]
            tokens, media = length + settings.max_new_tokens, self._count_media(kept)
            if tokens <= share * self.max_tokens and media <= share * self.max_media:
                break
            is_last = dropped + 1 == len(turns)
            if is_last and tokens <= self.max_tokens and media <= self.max_media:
                break
            if is_last or self.when_full == "error":
                raise SessionFullError(
                    f"With this turn the conversation needs {tokens} tokens ({length} to read, "
                    f"max_new_tokens={settings.max_new_tokens} to write) and {media} images and videos; the session has room for "
                    f"max_tokens={self.max_tokens} and max_media={self.max_media}. Lower max_new_tokens, start a "
                    "session with higher limits, or "
                    + ("give less." if is_last else 'let it drop old turns (when_full="drop").')
                )
            dropped, share = dropped + 1, KEPT_SHARE
        if dropped:
            logger.warning(
                "The session is full (max_tokens=%d, max_media=%d): its oldest %d turns were dropped.",
                self.max_tokens,
                self.max_media,
                dropped,
            )
        return kept, turn, dropped

    def _count_media(self, messages: list[dict]) -> int:
        return sum(self.processor.read_part(part)[0] != "text" for message in messages for part in _parts(message))

    def reset(self) -> None:
        """Go back to the beginning: the history that the session started with."""
        with self._alone():
            self._messages, self._memory = list(self._first_messages), self.model.prompt_memory(MediaCache())
            self.dropped_turns = 0

    def undo(self) -> Any:
        """Take back the last turn; returns the content of its question, for example to send it again.

        Raises:
            SessionError: there is none.
        """
        with self._alone():
            system, turns = _split_turns(self._messages)
            if not turns:
                raise SessionError("There is no turn to take back.")
            self._messages = [*system, *(message for turn in turns[:-1] for message in turn)]
            return turns[-1][0]["content"]

    def fork(self) -> "ChatSession":
        """Another session that goes on from here. What is computed is shared, and neither changes the other."""
        with self._alone():
            other = copy.copy(self)
            other._messages, other._memory, other._busy = (
                list(self._messages),
                copy.copy(self._memory),
                threading.Lock(),
            )
            other._memory.media_cache = copy.copy(self._memory.media_cache)
            return other

    def save(self, folder: str | PathLike) -> None:
        """Save the history ([`save_history`]): a `history.json` with images and videos, which `load` goes on from.

        Raises:
            HistoryError: `folder` holds something else.
        """
        with self._alone():
            save_history(self._messages, folder, self.processor)

    def _take(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise SessionBusyError(
                "The session is still answering. Read its stream to the end or close() it; use fork() or a session of "
                "its own for each thread."
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._take()
        try:
            yield
        finally:
            self._busy.release()


def _split_turns(messages: list[dict]) -> tuple[list[dict], list[list[dict]]]:
    """System messages at the beginning, and the turns: lists of messages that begin with a user's."""
    start = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns: list[list[dict]] = []
    for message in messages[start:]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return messages[:start], turns


def _parts(message: Mapping) -> list:
    content = message.get("content")
    return list(content) if isinstance(content, (list, tuple)) else [] if content is None else [content]


def _snapshot(given: Any) -> Any:
    """Messages as they are now: what is read again in a later turn must not have changed, such as the array of a camera."""
    if isinstance(given, Mapping):
        return {name: _snapshot(value) for name, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [_snapshot(value) for value in given]
    if isinstance(given, PathLike):  # its copy() would be one of the file (Python 3.14)
        return given
    for method in ("clone", "copy"):  # tensors; arrays, images and bytearrays
        if hasattr(given, method):
            return getattr(given, method)()
    return given
