"""Tokens of an answer -> pieces of thought, text and calls of tools, as soon as they are certain.

What is special:
- Nothing is sent that may turn out to be the beginning of a tag, of a stop string or of a character in several tokens.
- The pieces of a part together are the same as that part of the whole answer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


THINK_END = "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
MOST_TOKENS_OF_A_CHARACTER = 4
_CALL = re.compile(re.escape(CALL_START) + "(.*?)" + re.escape(CALL_END), re.DOTALL)


@dataclass
class TokenFact:
    """A token with the logarithm of its probability, and the likeliest ones in its place with theirs."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass
class Piece:
    """A piece of an answer. One of the first three is there, or none where only facts are told."""

    thought: str = ""
    text: str = ""
    call: tuple[str, str] | None = None  # name, and arguments in JSON
    facts: list[TokenFact] = field(default_factory=list)


class AnswerWriter:
    """Makes pieces of the tokens of one answer.

    Attributes:
        is_stopped: whether a stop string came; it and what follows are left out.
        thought_tokens: tokens of the thought so far, with the one that closes it.
        calls: how many tools were called.
    """

    def __init__(self, tokenizer: Any, thinking: bool, stops: Sequence[str] = (), with_calls: bool = False) -> None:
        self._tokenizer, self._stops, self._with_calls = tokenizer, list(stops), with_calls
        self._in_thought, self._at_start, self._after_thought = thinking, True, False
        self._pending: list[int] = []  # tokens of a character that is not whole
        self._held = ""  # text that is not certain
        self._facts: list[TokenFact] = []
        self.is_stopped, self.thought_tokens, self.calls = False, 0, 0

    def take(self, token: int, fact: TokenFact | None = None) -> list[Piece]:
        """Go on by a token that belongs to the answer."""
        if fact is not None and not self._in_thought:
            self._facts.append(fact)
        self.thought_tokens += self._in_thought
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(self._pending) < MOST_TOKENS_OF_A_CHARACTER:
            return []
        self._pending = []
        return self._with_facts(self._write(text, is_last=False))

    def finish(self) -> list[Piece]:
        """What was held back until now."""
        text = self._tokenizer.decode(self._pending, skip_special_tokens=False) if self._pending else ""
        self._pending = []
        pieces = [] if self.is_stopped else self._write(text, is_last=True)
        return self._with_facts(pieces or ([Piece()] if self._facts else []))

    def _with_facts(self, pieces: list[Piece]) -> list[Piece]:
        if pieces and not pieces[-1].thought:
            pieces[-1].facts, self._facts = self._facts, []
        return pieces

    def _write(self, text: str, is_last: bool) -> list[Piece]:
        self._held += text
        pieces = []
        if self._at_start and (self._in_thought or self._after_thought):
            self._held = self._held.lstrip("\n")
        if self._in_thought:
            thought, closed, rest = self._held.partition(THINK_END)
            if closed:
                self._in_thought, self._after_thought, self._at_start = False, True, True
                thought, self._held = thought.rstrip("\n"), rest.lstrip("\n")
            else:  # line ends before the tag are none of the thought's
                sure = thought[: len(thought) - (0 if is_last else _uncertain(thought, [THINK_END]))].rstrip("\n")
                thought, self._held = sure, "" if is_last else thought[len(sure) :]
                self._at_start = self._at_start and not sure
            pieces += [Piece(thought=thought)] if thought else []
        if not self._in_thought and self._held:
            self._at_start = False
            pieces += self._write_answer(is_last)
        return pieces

    def _write_answer(self, is_last: bool) -> list[Piece]:
        ends = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if ends:
            self._held, self.is_stopped, is_last = self._held[: min(ends)], True, True
        if not self._with_calls:
            return self._emit(is_last, self._stops)
        pieces = []
        while found := _CALL.search(self._held):
            if (call := _read_call(found[1])) is None:  # no call after all: it stays text
                pieces.append(Piece(text=self._held[: found.end()]))
            else:
                before = self._held[: found.start()].rstrip("\n")
                pieces += [Piece(text=before)] if before else []
                pieces.append(Piece(call=call))
                self.calls += 1
            self._held = self._held[found.end() :]
        if CALL_START in self._held and not is_last:
            return pieces
        if self.calls:  # what stands between calls
            self._held = self._held.lstrip("\n")
        return pieces + self._emit(is_last, [*self._stops, CALL_START])

    def _emit(self, is_last: bool, marks: list[str]) -> list[Piece]:
        kept = 0 if is_last else _uncertain(self._held, marks)
        if self._with_calls and not is_last:  # line ends before a call are none of the text's
            rest = self._held[: len(self._held) - kept]
            kept += len(rest) - len(rest.rstrip("\n"))
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return [Piece(text=text)] if text else []


def _uncertain(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    lengths = range(max((len(mark) for mark in marks), default=1) - 1, 0, -1)
    return next((length for length in lengths if any(text[-length:] == mark[:length] for mark in marks)), 0)


def _read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments (in JSON) of a call; None where it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
