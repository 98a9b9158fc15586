"""An assistant: a conversation with a personality, bounds on what it remembers, and a transcript of everything.

What is special:
- it sits on a session, so a turn computes only what is new as long as nothing is forgotten;
- what the model no longer sees (old turns, old pictures) stays in the transcript, and each answer says how many turns
  were dropped for it;
- in place of a forgotten picture the model reads that there was one;
- a turn happens whole or not at all.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path


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
FORGOTTEN = "(Here was a picture or clip that is no longer shown.)"
KEPT_SHARE = (
    0.75  # of the turns, when they become too many: forgetting one each turn would compute all the others anew
)


class AssistantError(ValueError):
    """A setting of the assistant that does not exist."""


class TranscriptError(ValueError):
    """A transcript cannot be saved there."""


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
        model, processor: a MiniCPM-V and its processor (that in the model's folder where it is not given).
        personality: "helpful", "concise" or "friendly".
        system_prompt: a text of your own in its place.
        max_turns: most turns that the model sees, the new one included.
        max_tokens: most tokens of prompt and answer; that of `start_chat` where it is not given.
        media: which pictures and clips of earlier turns it sees: "keep" all, those of the "latest" turn that brought
            some, or each only "once", in its own turn.
        options: those of `model.start_chat`: max_pictures, max_new_tokens, enable_thinking, sampling, ...
    """

    def __init__(
        self,
        model,
        processor=None,
        personality: str = "helpful",
        *,
        system_prompt: str | None = None,
        max_turns: int = 50,
        max_tokens: int | None = None,
        media: str = "keep",
        **options,
    ):
        if system_prompt is None and personality not in PERSONALITIES:
            raise AssistantError(
                f"personality={personality!r} does not exist; choose one of {', '.join(PERSONALITIES)}, or give a text of "
                "your own as system_prompt"
            )
        if media not in MEDIA_POLICIES:
            raise AssistantError(f"media={media!r} does not exist; choose one of {', '.join(MEDIA_POLICIES)}")
        if isinstance(max_turns, bool) or not isinstance(max_turns, int) or max_turns < 1:
            raise AssistantError(f"max_turns={max_turns!r} must be a whole number from 1")
        self.model, self.processor = model, processor
        self.system_prompt = PERSONALITIES[personality] if system_prompt is None else system_prompt
        self.max_turns, self.media = max_turns, media
        self._options = {"max_tokens": max_tokens, **options}
        self.turns: list[Turn] = []  # all of them, whether the model still sees them or not
        self._first = 0  # turn from which on the model sees them
        self._session, self._view = self._start([]), []

    def send(self, content, **options):
        """Ask; `content` and `options` as for `ChatSession.send`. Returns its `ChatOutput`."""
        session, first, view = self._prepared(content)
        output = session.send(content, **options)
        self._keep(session, first, view, output)
        return output

    def stream(self, content, **options) -> Iterator[str]:
        """Ask, and give the answer in pieces. Of a stream that is closed early, what was read is the answer."""
        session, first, view = self._prepared(content)
        with session.send(content, stream=True, **options) as pieces:
            try:
                yield from pieces
            finally:
                pieces.close()
                if pieces.output is not None:
                    self._keep(session, first, view, pieces.output)

    def reset(self):
        """Begin anew, with the same settings and an empty transcript."""
        self._session, self._view, self._first, self.turns = self._start([]), [], 0, []

    def save(self, folder: str | PathLike) -> Path:
        """Save the transcript: `history.json` with pictures and clips, which `model.load_chat` can go on from, and
        `transcript.md` to read. An older one in `folder` is replaced. Returns the path of the Markdown file.

        Raises:
            TranscriptError: `folder` holds something else, or a part of the conversation cannot be written.
        """
        folder = Path(folder)
        everything = [(index, True) for index in range(len(self.turns))]
        try:
            self._start(everything).save(folder)
        except (ValueError, OSError) as error:
            raise TranscriptError(f"The transcript cannot be saved: {error}") from error
        messages = json.loads((folder / "history.json").read_text(encoding="utf-8"))["messages"]
        questions = [message["content"] for message in messages if message["role"] == "user"]
        file = folder / "transcript.md"
        file.write_text(self._markdown(questions), encoding="utf-8")
        return file

    # ---- what the model sees ----

    def _prepared(self, content):
        """(session, first turn that it sees, view) for a question: the session that there is, or where something is to
        be forgotten a new one."""
        first = self._first
        if len(self.turns) - first + 1 > self.max_turns:
            first = len(self.turns) + 1 - max(1, int(self.max_turns * KEPT_SHARE))
        view = self._view_from(first, content)
        session = self._session if view == self._view else self._start(view)
        return session, first, view

    def _view_from(self, first, content):
        """(turn, whether its pictures and clips are seen) of the turns before the question `content`."""
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
        return self.model.start_chat(
            self.processor, system_prompt=self.system_prompt, history=history or None, **self._options
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
                    names = [f"![picture]({name})" for name in names]
                elif kind == "video":
                    names = [f"[clip]({name})" for name in names]
                lines += [f"**You:** {' '.join(names)}", ""]
            if turn.dropped_turns:
                lines += [f"*(The oldest {turn.dropped_turns} turns that were still known were forgotten here.)*", ""]
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
