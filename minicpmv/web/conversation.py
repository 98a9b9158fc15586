"""A conversation as the page shows it, on a session of the model. Knows nothing of the page itself.

What is special:
- A turn that fails or is stopped before its first word leaves the conversation as it was.
- An answer is tried again on a fork of the session, so the old one stays until the new one has come.
- Slices and frames belong to a session: where they are changed, the history moves into a new one.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from minicpmv.apps.clips import GREEDY
from minicpmv.web.view import look_at


THINKING = {"Off": False, "Auto": "auto", "On": True}
MAX_PACKING = 6  # frames in a group
SECONDS_BETWEEN_UPDATES = 0.05
# Words of the model's own in angle brackets, which a browser would take for tags.
MODEL_TAGS = re.compile(r"<(?=/?(?:ref|box|quad|point|image|slice|unk|think)\b)")


class ConversationError(ValueError):
    """A turn that cannot be done: the message tells why."""


@dataclass(frozen=True)
class Settings:
    """What the page lets people choose."""

    thinking: str = "Off"  # a key of THINKING
    temperature: float = 0.7  # 0: the likeliest token each time
    top_p: float = 0.8
    max_new_tokens: int = 2048
    max_slice_nums: int = 9
    fps: float = 3
    num_frames: int = 0  # of a clip; 0: by fps
    packing: int = 0  # frames in a group; 0: as the length of the clip asks for

    @property
    def of_answer(self) -> dict:
        """Options of `ChatSession.send`."""
        decoding = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else GREEDY
        return {"enable_thinking": THINKING[self.thinking], "max_new_tokens": int(self.max_new_tokens), **decoding}

    @property
    def of_session(self) -> dict:
        """Options of `start_chat`. The slices are those of pictures alone: frames stay whole."""
        return {"images_kwargs": {"max_slice_nums": int(self.max_slice_nums)}, **self.of_clips}

    @property
    def of_clips(self) -> dict:
        """Options of the video processor."""
        options = {"fps": self.fps}
        if self.num_frames:
            options["num_frames"] = int(self.num_frames)
        if self.packing:
            options |= {"max_num_packing": MAX_PACKING, "force_packing": int(self.packing)}
        return options


class Conversation:
    """What one browser tab says and is told.

    Attributes:
        messages: for `gr.Chatbot`: {"role", "content"}, where a file is {"path"}; thoughts have "metadata".
        seen: (`Seen` list) the pictures and clips that the model looks at, in order.
        output: `ChatOutput` of the last answer.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.messages, self.seen, self.output = [], [], None
        self._session, self._settings, self._stream = None, None, None
        self._is_answering = self._is_stopped = False
        self._looked_at = {}  # (file, options of the session) -> Seen

    def ask(self, text: str, files: list[str], settings: Settings) -> Iterator[None]:
        """Ask; yields whenever `messages` or `seen` have changed.

        Raises:
            ConversationError: there is nothing to ask, or it was stopped before the first word.
            ValueError: a file, or the turn, cannot be read by the model.
            RuntimeError: the conversation is still answering, or the memory of the accelerator is full.
        """
        if not text.strip() and not files:
            raise ConversationError("Write a question, or add a picture or a clip.")
        content = [_part(self.processor, file) for file in files] + (
            [{"type": "text", "text": text}] if text.strip() else []
        )
        shown = [{"path": file} for file in files] + ([_as_markdown(text)] if text.strip() else [])
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
                        reply = _reply(thought, text, thinking_ended - begun, pieces.is_thought)
                        self.messages, shown = [*messages, *(reply or [_waiting()])], now
                        yield
        finally:
            if self._stream is not None:
                output = self._stream.output
            self._stream, self._is_answering = None, False
            if output is None:
                self.messages, self.seen = before, seen
            else:
                reply = _reply(output.reasoning, output.text.strip() or "(no answer)", thinking_ended - begun, False)
                self.messages = [*messages, *reply]
                self._session, self._settings, self.output = session, settings, output
                self._look(session, settings)
        if output is None:
            raise ConversationError("Stopped before the first word. The question is back in its box.")
        yield

    def _session_for(self, settings):
        if self._is_answering:
            raise ConversationError("Wait for the end of the answer, or stop it.")
        if self._session is not None and settings.of_session == self._settings.of_session:
            return self._session
        history = self._session.history if self._session is not None else None
        return self.model.start_chat(self.processor, history=history, **settings.of_session)

    def _last_question(self):
        places = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise ConversationError("There is no question yet.")
        return places[-1]

    def _look(self, session, settings, content=()):
        """Look at what the history holds, and at the parts of a question that is not there yet."""
        parts = [part for message in session.history if message["role"] == "user" for part in message["content"]]
        files = [(part["type"], part[part["type"]]) for part in [*parts, *content] if part["type"] != "text"]
        options = str(settings.of_session)
        self._looked_at = {
            (file, options): self._looked_at.get((file, options))
            or look_at(self.processor, kind, file, settings.max_slice_nums, settings.of_clips)
            for kind, file in files
        }
        self.seen = [self._looked_at[file, options] for _, file in files]


def _part(processor, file):
    kind = processor.kind_of(file) or "image"
    return {"type": kind, kind: file}


def _waiting():
    return {"role": "assistant", "content": "…"}


def _reply(thought, text, seconds, is_open):
    """Messages of an answer: the thought, folded when it has ended, and the text."""
    thought = (thought or "").replace("<think>", "").replace("</think>", "").strip()
    messages = []
    if thought or is_open:
        metadata = {"title": "Thinking", "status": "pending"} if is_open else {"title": "Thought", "status": "done"}
        if not is_open:
            metadata["duration"] = round(seconds, 1)
        messages.append({"role": "assistant", "content": _as_markdown(thought) or "…", "metadata": metadata})
    if text.strip():
        messages.append({"role": "assistant", "content": _as_markdown(text.strip())})
    return messages


def _as_markdown(text):
    return MODEL_TAGS.sub("&lt;", text)
