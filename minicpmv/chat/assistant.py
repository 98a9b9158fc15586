"""An assistant: a conversation with a personality, bounds on what it remembers, and a transcript of everything.

What is special:
- it uses a session, so a turn computes only what is new as long as nothing is forgotten;
- what the model no longer sees (old turns, old images) stays in the transcript, and each answer says how many turns were
  dropped for it;
- in place of a forgotten image the model reads that there was one;
- a turn happens completely or not at all.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from minicpmv.chat.session import ChatSession
from minicpmv.errors import MiniCPMVError


PERSONALITIES = {
    "helpful": (
        "You are a helpful assistant. Answer completely and correctly, explain what is not obvious, and say so when you "
        "do not know or cannot see something."
    ),
    "concise": (
        "You are a concise assistant. Answer in as few words as the question allows, without introduction, repetition or "
        "closing remarks. Say so when you do not know."
    ),
    "friendly": (
        "You are a friendly assistant. Answer warmly and in plain words, as to a friend, and offer a next step where it "
        "helps. Say so when you do not know."
    ),
}
MEDIA_POLICIES = ("keep", "latest", "once")
FORGOTTEN = "(Here was an image or video that is no longer shown.)"
# Of the turns, when they become too many: dropping one at each turn would compute all the others again each time.
KEPT_SHARE = 0.75


class AssistantError(MiniCPMVError):
    """A setting that the assistant does not have."""


@dataclass
class Turn:
    """A question (the parts of its content), the answer, and what happened."""

    time: str  # local, ISO 8601
    content: list
    answer: str
    reasoning: str | None
    finish_reason: str
    dropped_turns: int  # that the model had to forget for this one


class Assistant:
    """A conversation that goes on.

    Args:
        model, processor: a MiniCPM-V and its processor.
        personality: "helpful", "concise" or "friendly".
        system_prompt: a text of your own instead.
        max_turns: most turns that the model sees, including the new one.
        max_tokens: most tokens of prompt and answer; by default the session's.
        media: which images and videos of earlier turns it sees: "keep" shows all, "latest" those of the last turn that
            brought some, "once" each only in its own turn.
        options: those of a session: max_media, max_new_tokens, enable_thinking, decoding, ...

    Attributes:
        turns: all of them, whether the model still sees them or not.

    Raises:
        AssistantError: there is no such personality or policy, or `max_turns` is not a positive integer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        personality: str = "helpful",
        *,
        system_prompt: str | None = None,
        max_turns: int = 50,
        max_tokens: int | None = None,
        media: str = "keep",
        **options: Any,
    ) -> None:
        if system_prompt is None and personality not in PERSONALITIES:
            raise AssistantError(
                f"personality={personality!r} does not exist; choose one of {', '.join(PERSONALITIES)}, or give a text of "
                "your own as system_prompt"
            )
        if media not in MEDIA_POLICIES:
            raise AssistantError(f"media={media!r} does not exist; choose one of {', '.join(MEDIA_POLICIES)}")
        if isinstance(max_turns, bool) or not isinstance(max_turns, int) or max_turns < 1:
            raise AssistantError(f"max_turns={max_turns!r} must be a positive integer")
        self.model, self.processor = model, processor
        self.system_prompt = PERSONALITIES[personality] if system_prompt is None else system_prompt
        self.max_turns, self.media = max_turns, media
        self._options = {"max_tokens": max_tokens, **options}
        self.turns: list[Turn] = []
        self._first = 0  # the first turn that the model sees
        self._view: list[tuple[int, bool]] = []
        self._session = self._start([])

    @property
    def history(self) -> list[dict]:
        """The conversation as the model sees it, in messages."""
        return self._session.history

    def send(self, content: Any, **options: Any) -> Any:
        """Ask; `content` and `options` as for `ChatSession.send`. Returns its `ChatOutput`."""
        session, first, view = self._prepared(content)
        output = session.send(content, **options)
        self._keep(session, first, view, output)
        return output

    def stream(self, content: Any, **options: Any) -> Iterator[str]:
        """Ask, and get the answer in pieces. If the stream is closed early, what was read of it is the answer."""
        session, first, view = self._prepared(content)
        with session.send(content, stream=True, **options) as pieces:
            try:
                yield from pieces
            finally:
                pieces.close()
                if pieces.output is not None:
                    self._keep(session, first, view, pieces.output)

    def reset(self) -> None:
        """Start over with the same settings and an empty transcript."""
        self._session, self._view, self._first, self.turns = self._start([]), [], 0, []

    def save(self, folder: str | PathLike) -> Path:
        """Save everything: `history.json` with images and videos, which a session can be loaded from, and `transcript.md`
        to read. An older one in `folder` is replaced. Returns the path of the Markdown file.

        Raises:
            MiniCPMVError: `folder` holds something else, or a part of the conversation cannot be saved.
        """
        folder = Path(folder)
        self._start([(index, True) for index in range(len(self.turns))]).save(folder)
        messages = json.loads((folder / "history.json").read_text(encoding="utf-8"))["messages"]
        questions = [message["content"] for message in messages if message["role"] == "user"]
        file = folder / "transcript.md"
        file.write_text(self._markdown(questions), encoding="utf-8")
        return file

    # ---- what the model sees ----

    def _prepared(self, content):
        """(session, first turn that it sees, view) for a question: the current session, or a new one where something is to
        be forgotten."""
        first = self._first
        if len(self.turns) - first + 1 > self.max_turns:
            first = len(self.turns) + 1 - max(1, int(self.max_turns * KEPT_SHARE))
        view = self._view_from(first, content)
        session = self._session if view == self._view else self._start(view)
        return session, first, view

    def _view_from(self, first, content):
        """(turn, whether its images and videos are seen) of the turns before the question `content`."""
        shown = [index for index, turn in enumerate(self.turns) if _has_media(turn.content)]
        if self.media == "once":
            shown = []
        elif self.media == "latest":
            shown = [] if _has_media(content) else shown[-1:]
        return [
            (index, index in shown or not _has_media(self.turns[index].content))
            for index in range(first, len(self.turns))
        ]

    def _start(self, view):
        history = []
        for index, with_media in view:
            turn = self.turns[index]
            parts = turn.content if with_media else [FORGOTTEN if _is_media(part) else part for part in turn.content]
            history += [{"role": "user", "content": parts}, {"role": "assistant", "content": turn.answer}]
        return ChatSession(
            self.model, self.processor, system_prompt=self.system_prompt, history=history or None, **self._options
        )

    def _keep(self, session, first, view, output):
        dropped_here = first - self._first
        view = [*view, (len(self.turns), True)]
        self._session, self._first = session, first + output.dropped_turns
        self._view = view[output.dropped_turns :]
        output.dropped_turns += dropped_here
        self.turns.append(
            Turn(
                time=datetime.now().isoformat(timespec="seconds"),
                content=_parts(session.history[-2]["content"]),  # as it was; a caller may paint over an array
                answer=output.text,
                reasoning=output.reasoning,
                finish_reason=output.finish_reason,
                dropped_turns=output.dropped_turns,
            )
        )

    def _markdown(self, questions):
        lines = ["# Conversation", "", *_quoted(self.system_prompt), ""]
        for turn, question in zip(self.turns, questions, strict=True):
            lines += [f"## {turn.time}", ""]
            for part in question if isinstance(question, list) else [{"type": "text", "text": question}]:
                kind = part["type"]
                names = part[kind] if isinstance(part[kind], list) else [part[kind]]
                if kind == "image":
                    names = [f"![image]({name})" for name in names]
                elif kind == "video":
                    names = [f"[video]({name})" for name in names]
                lines += [f"**You:** {' '.join(names)}", ""]
            if turn.dropped_turns:
                lines += [
                    f"*(From here on the model no longer sees the {turn.dropped_turns} oldest turns that it still saw.)*",
                    "",
                ]
            if turn.reasoning:
                lines += ["Thought:", "", *_quoted(turn.reasoning), ""]
            lines += [f"**Assistant:** {turn.answer}", ""]
            if turn.finish_reason != "stop":
                lines += [f"*(The answer is unfinished: {turn.finish_reason}.)*", ""]
        return "\n".join(lines)


def _quoted(text):
    return [f"> {line}".rstrip() for line in text.splitlines()]


def _parts(content):
    return list(content) if isinstance(content, (list, tuple)) else [content]


def _is_media(part):
    return not isinstance(part, str) and not (isinstance(part, Mapping) and part.get("type") == "text")


def _has_media(content):
    return any(map(_is_media, _parts(content)))
