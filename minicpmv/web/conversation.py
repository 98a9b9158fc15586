"""Conversations as the page shows them, on sessions of the model. Knows nothing of the page itself.

What is special:
- A turn that fails or is stopped before its first word leaves the conversation as it was.
- An answer is tried again on a fork of the session, so the old one stays until the new one is there.
- Slices and frames belong to a session: where they are changed, the history moves into a new one.
- Pages of a PDF become images next to the file, so they are cleared away with it.
"""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpmv.apps.documents.pages import DocumentError, OpenDocument
from minicpmv.errors import MiniCPMVError, is_expected, require
from minicpmv.web.view import Seen, look_at


THINKING: dict[str, bool | str] = {"Off": False, "Auto": "auto", "On": True}
MAX_PACKING = 6  # frames in a group
MOST_PAGES = 16  # of a PDF
PAGE_DPI = 150
SECONDS_BETWEEN_UPDATES = 0.05
# Words of the model's own in angle brackets, which a browser would take for tags.
MODEL_TAGS = re.compile(r"<(?=/?(?:ref|box|quad|point|image|slice|unk|think)\b)")


class ConversationError(MiniCPMVError):
    """A turn that cannot be done: the message says why, in the words of the page."""


@dataclass(frozen=True)
class Settings:
    """What the page lets people choose."""

    thinking: str = "Off"  # a key of THINKING
    temperature: float = 0.7  # 0: the likeliest token each time
    top_p: float = 0.8
    max_new_tokens: int = 2048
    max_slice_nums: int = 9
    fps: float = 3
    num_frames: int = 0  # of a video; 0: by fps
    packing: int = 0  # frames in a group; 0: by the length of the video

    @property
    def of_answer(self) -> dict[str, Any]:
        """Options of `ChatSession.send`."""
        decoding: dict[str, Any] = {"decoding": "greedy"}
        if self.temperature > 0:
            decoding = {"decoding": "sample", "temperature": self.temperature, "top_p": self.top_p}
        return {"enable_thinking": THINKING[self.thinking], "max_new_tokens": int(self.max_new_tokens), **decoding}

    @property
    def of_session(self) -> dict[str, Any]:
        """Options of a session. The slices are those of images alone: frames stay whole."""
        return {"images_kwargs": {"max_slice_nums": int(self.max_slice_nums)}, **self.of_videos}

    @property
    def of_videos(self) -> dict[str, Any]:
        """Options of the video processor."""
        options: dict[str, Any] = {"fps": self.fps}
        if self.num_frames:
            options["num_frames"] = int(self.num_frames)
        if self.packing:
            options |= {"max_num_packing": MAX_PACKING, "force_packing": int(self.packing)}
        return options


class Conversation:
    """What one browser tab says and is told.

    Attributes:
        messages: for `gr.Chatbot`: {"role", "content"}, where a file is {"path"}; thoughts have "metadata".
        seen: the images and videos that the model looks at, in order.
        output: `ChatOutput` of the last answer.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.messages: list[dict] = []
        self.seen: list[Seen] = []
        self.output: Any = None
        self._session: Any = None
        self._settings: Settings | None = None
        self._stream: Any = None
        self._is_answering = self._is_stopped = False
        self._looked_at: dict[tuple[str, str], Seen] = {}  # (file, options of the session) ->

    def ask(self, text: str, files: list[str], settings: Settings) -> Iterator[None]:
        """Ask; yields whenever `messages` or `seen` have changed.

        Raises:
            ConversationError: there is nothing to ask, a file cannot be read, the conversation is still answering, or it
                was stopped before the first word.
            MiniCPMVError: (or a twin of it in the model's own files) the turn is too long.
        """
        if not text.strip() and not files:
            raise ConversationError("Write a question, or add an image, a video or a PDF.")
        media = [part for file in files for part in self._parts(file, settings)]
        content = media + ([{"type": "text", "text": text}] if text.strip() else [])
        shown = [{"path": part[part["type"]]} for part in media] + ([_as_markdown(text)] if text.strip() else [])
        messages = [*self.messages, {"role": "user", "content": shown}]
        yield from self._answer(self._session_for(settings), content, messages, settings)

    def retry(self, settings: Settings) -> Iterator[None]:
        """Answer the last question again; else as `ask`."""
        place = self._last_question()
        session = self._session_for(settings).fork()
        yield from self._answer(session, session.undo(), self.messages[: place + 1], settings)

    def undo(self) -> tuple[str, list[str]]:
        """Take the last turn back; returns (text, files) of its question.

        Raises:
            ConversationError: there is none.
        """
        place = self._last_question()
        content = self._session.undo()
        self.messages, self.output = self.messages[:place], None
        self._look(self._session, self._settings)
        texts = [part["text"] for part in content if part["type"] == "text"]
        return "\n".join(texts), [part[part["type"]] for part in content if part["type"] != "text"]

    def stop(self) -> None:
        """Stop the answer that is being written; waits until the model has stopped."""
        self._is_stopped = True
        if self._stream is not None:
            self._stream.close()

    def _answer(self, session, content, messages, settings):
        before, seen, output = self.messages, self.seen, None
        self.messages, self._is_answering, self._is_stopped = [*messages, _waiting()], True, False
        thought = text = ""
        try:
            yield
            with session.send(content, stream=True, **settings.of_answer) as self._stream:
                pieces = self._stream
                self._look(session, settings, content)
                yield
                if self._is_stopped:  # while the question was read
                    pieces.close()
                begun = shown = thinking_ended = time.perf_counter()
                for piece in pieces:
                    now = time.perf_counter()
                    if pieces.is_thought:
                        thought, thinking_ended = thought + piece, now
                    else:
                        text += piece
                    if now - shown >= SECONDS_BETWEEN_UPDATES:
                        words, _ = self.processor.split_thought(thought)
                        reply = _reply(words or "", text, thinking_ended - begun, pieces.is_thought)
                        self.messages, shown = [*messages, *(reply or [_waiting()])], now
                        yield
        finally:
            if self._stream is not None:
                output = self._stream.output
            self._stream, self._is_answering = None, False
            if output is None:
                self.messages, self.seen = before, seen
            else:
                text = output.text.strip() or "(no answer)"
                reply = _reply(output.reasoning or "", text, thinking_ended - begun, is_open=False)
                self.messages = [*messages, *reply]
                self._session, self._settings, self.output = session, settings, output
                self._look(session, settings)
        if output is None:
            raise ConversationError("Stopped before the first word. The question is back in its box.")
        yield

    def _session_for(self, settings):
        if self._is_answering:
            raise ConversationError("Wait for the end of the answer, or stop it.")
        from minicpmv.chat import ChatSession  # imports torch

        if self._session is not None and settings.of_session == self._settings.of_session:
            return self._session
        history = self._session.history if self._session is not None else None
        return ChatSession(self.model, self.processor, history=history, **settings.of_session)

    def _last_question(self):
        places = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise ConversationError("There is no question yet.")
        return places[-1]

    def _look(self, session, settings, content=()):
        """Look at what the history holds, and at the parts of a question that is not in it yet."""
        parts = [part for message in session.history if message["role"] == "user" for part in message["content"]]
        files = [(part["type"], part[part["type"]]) for part in [*parts, *content] if part["type"] != "text"]
        options = str(settings.of_session)
        self._looked_at = {(file, options): self._look_at(kind, file, settings) for kind, file in files}
        self.seen = [self._looked_at[file, options] for _, file in files]

    def _look_at(self, kind, file, settings):
        place = file, str(settings.of_session)
        if place not in self._looked_at:
            seen = look_at(self.processor, kind, file, settings.max_slice_nums, settings.of_videos)
            self._looked_at[place] = seen
        return self._looked_at[place]

    def _parts(self, file, settings):
        """A file as parts of a message: one, or one for each page of a PDF.

        Raises:
            ConversationError: it is of another kind, damaged or too large.
        """
        path = Path(file)
        if path.suffix.lower() == ".pdf":
            return [{"type": "image", "image": page} for page in _draw_pages(path)]
        kind = self.processor.kind_of(file)
        if kind is None:
            raise ConversationError(
                f"{path.name} is not an image, a video or a PDF. Save it as one of them and add that."
            )
        try:
            self._look_at(kind, file, settings)
        except (ValueError, OSError) as error:
            if not (is_expected(error) or isinstance(error, OSError)):
                raise
            remedy = "Save it again, or smaller, as JPEG or PNG" if kind == "image" else "Save it again as MP4"
            raise _unreadable(path, error, remedy) from error
        return [{"type": kind, kind: file}]


class Conversations:
    """The conversations of the tabs that were used last, by the key that each tab keeps.

    Args:
        most: conversations that are kept; beyond it the one unused for longest is forgotten.
    """

    def __init__(self, model: Any, processor: Any, most: int = 16) -> None:
        self.model, self.processor, self.most = model, processor, most
        self._kept: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Conversation | None:
        """That of a tab, or None: it has none, or it is forgotten."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def begin(self, key: str) -> Conversation:
        """A new one for a tab, in place of the one it may have."""
        with self._lock:
            self._kept[key] = Conversation(self.model, self.processor)
            self._kept.move_to_end(key)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
            return self._kept[key]

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()


def _draw_pages(file):
    """The pages of a PDF, as files of images next to it.

    Raises:
        ConversationError: it is damaged, encrypted or too long.
        MissingPackageError: of pypdfium2.
    """
    require("web", "pypdfium2")
    drawn = []
    try:
        with OpenDocument(file, dpi=PAGE_DPI) as document:
            if len(document) > MOST_PAGES:
                raise ConversationError(
                    f"{file.name} has {len(document)} pages, and {MOST_PAGES} can be added at once. Save the pages that you "
                    "need as a PDF of their own, or read the whole with minicpmv read."
                )
            for page in document:
                drawn.append(str(file.with_name(f"{file.stem}, page {page.number}.png")))
                page.image.save(drawn[-1])
    except DocumentError as error:
        raise _unreadable(file, error, "Save it again, without a password") from error
    return drawn


def _unreadable(file: Path, error: Exception, remedy: str) -> ConversationError:
    """The reason of an error about a file, and what to do on the page; the remedies of the library are for programmers."""
    reason = str(error).partition(";")[0].replace(str(file), file.name)
    return ConversationError(f"{reason}. {remedy}, and add that.")


def _waiting():
    return {"role": "assistant", "content": "…"}


def _reply(thought: str, text: str, seconds: float, is_open: bool) -> list[dict]:
    """Messages of an answer: the thought, which is folded when it has ended, and the text."""
    thought = thought.strip()
    messages = []
    if thought or is_open:
        metadata: dict[str, Any] = (
            {"title": "Thinking", "status": "pending"} if is_open else {"title": "Thought", "status": "done"}
        )
        if not is_open:
            metadata["duration"] = round(seconds, 1)
        messages.append({"role": "assistant", "content": _as_markdown(thought) or "…", "metadata": metadata})
    if text.strip():
        messages.append({"role": "assistant", "content": _as_markdown(text.strip())})
    return messages


def _as_markdown(text):
    return MODEL_TAGS.sub("&lt;", text)
