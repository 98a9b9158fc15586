"""Pieces of an answer -> the objects of OpenAI's API: whole answers, and the chunks of streams."""

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from minicpmv.serving.scheduler import Finish
from minicpmv.serving.schema import CompletionRequest, GenerationRequest
from minicpmv.serving.writing import Piece, TokenFact


class ChatResponse:
    """The answers to one request on their way to its client.

    Args:
        choices: how many answers there will be.
        token_text: the text of a token.
    """

    whole, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, request: GenerationRequest, name: str, choices: int, token_text: Callable[[int], str]) -> None:
        self._token_text = token_text
        kind = "cmpl" if isinstance(request, CompletionRequest) else "chatcmpl"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self._with_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._with_logprobs = bool(getattr(request, "logprobs", None))
        self._pieces: list[list[Piece]] = [[] for _ in range(choices)]
        self._finishes: list[Finish | None] = [None] * choices
        self._calls = [0] * choices

    # ---- streams ----

    def opening(self) -> Iterator[dict[str, Any]]:
        """The first chunk of each answer."""
        for index in range(len(self._pieces)):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def chunk_of(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of an answer."""
        delta: dict[str, Any] = {}
        if piece.thought:
            delta["reasoning_content"] = piece.thought
        if piece.text:
            delta["content"] = piece.text
        if piece.call:
            delta["tool_calls"] = [{"index": self._calls[index], **_call(*piece.call)}]
            self._calls[index] += 1
        return self._chunk(index, delta, piece.facts)

    def end_of(self, index: int, finish: Finish) -> dict[str, Any]:
        """The last chunk of an answer."""
        self._finishes[index] = finish
        return self._chunk(index, {}, reason=finish.reason)

    def closing(self) -> Iterator[dict[str, Any]]:
        """What comes after all answers: the usage, where it was asked for."""
        if self._with_usage:
            yield {**self._head, "object": self.chunk, "choices": [], "usage": self._usage()}

    def _chunk(self, index: int, delta: dict, facts: list[TokenFact] | None = None, reason: str | None = None) -> dict:
        choice = {"index": index, **self._delta(delta), "logprobs": self._logprobs(facts), "finish_reason": reason}
        usage = {"usage": None} if self._with_usage else {}
        return {**self._head, "object": self.chunk, "choices": [choice], **usage}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"delta": delta}

    # ---- whole answers ----

    def add(self, index: int, piece: Piece) -> None:
        self._pieces[index].append(piece)

    def add_end(self, index: int, finish: Finish) -> None:
        self._finishes[index] = finish

    def complete(self) -> dict[str, Any]:
        """All answers, once they have ended."""
        choices = []
        for index, (pieces, finish) in enumerate(zip(self._pieces, self._finishes, strict=True)):
            assert finish is not None
            facts = [fact for piece in pieces for fact in piece.facts]
            choice = {"index": index, **self._message(pieces), "logprobs": self._logprobs(facts)}
            choices.append(choice | {"finish_reason": finish.reason})
        return {**self._head, "object": self.whole, "choices": choices, "usage": self._usage()}

    def _message(self, pieces: list[Piece]) -> dict[str, Any]:
        text, thought = "".join(piece.text for piece in pieces), "".join(piece.thought for piece in pieces)
        calls = [_call(*piece.call) for piece in pieces if piece.call]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
        }
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    # ---- both ----

    def _logprobs(self, facts: list[TokenFact] | None) -> dict[str, Any] | None:
        if not self._with_logprobs or not facts:
            return None
        return {
            "content": [
                self._token(fact.token, fact.logprob)
                | {"top_logprobs": [self._token(token, value) for token, value in fact.likeliest]}
                for fact in facts
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    def _usage(self) -> dict[str, Any]:
        ends = [finish for finish in self._finishes if finish is not None]
        prompt, generated = ends[0].prompt_tokens, sum(finish.generated_tokens for finish in ends)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": ends[0].cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": sum(finish.thought_tokens for finish in ends)},
        }


class CompletionResponse(ChatResponse):
    """As of a chat, for a text that was gone on with."""

    whole = chunk = "text_completion"

    def opening(self) -> Iterator[dict[str, Any]]:
        yield from ()

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"text": delta.get("content", "")}

    def _message(self, pieces: list[Piece]) -> dict[str, Any]:
        return {"text": "".join(piece.text for piece in pieces)}


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
