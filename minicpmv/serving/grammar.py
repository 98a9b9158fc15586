"""Answers that keep to a form: JSON, JSON of a schema, calls of tools. llguidance tells which tokens may come next."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from minicpmv.errors import require
from minicpmv.serving.schema import ChatRequest, NamedTool, RequestError


# Blanks as json.dumps writes them: a choice of them would let a small model write nothing else.
BLANKS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT = {"type": "object"}


class Grammars:
    """Grammars over the vocabulary of a model. Several threads may use it."""

    def __init__(self, model: Any, processor: Any, stop_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size = processor.tokenizer, model.config.vocab_size
        self._stop_ids = list(stop_ids)
        self._vocabulary: Any = None  # in the form of llguidance
        self._lock = threading.Lock()

    def of(self, request: ChatRequest) -> str | None:
        """The grammar that the answer to a request has to keep to; None where there is none.

        Raises:
            RequestError: a schema is not one that can be followed.
            MissingPackageError: llguidance is not installed.
        """
        asked = request.asked_format
        if asked is None and not request.must_call:
            return None
        require("serve", "llguidance")
        from llguidance import LLMatcher

        if request.must_call:
            grammar, param = LLMatcher.grammar_from_lark(_calls(request)), "tools"
        else:
            schema = ANY_OBJECT if asked is None or asked.json_schema is None else asked.json_schema.schema_
            grammar, param = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=BLANKS), "response_format"
        if reason := LLMatcher.validate_grammar(grammar, self._known_vocabulary()):
            raise RequestError(f"{param}: this JSON schema cannot be followed ({reason[:300].strip()})", param=param)
        return grammar

    def matcher(self, grammar: str) -> "Matcher":
        """What follows one answer through a grammar."""
        from llguidance import LLMatcher

        return Matcher(LLMatcher(self._known_vocabulary(), grammar), self._vocab_size)

    def _known_vocabulary(self) -> Any:
        with self._lock:
            if self._vocabulary is None:
                from llguidance.hf import from_tokenizer

                self._vocabulary = from_tokenizer(self._tokenizer, self._vocab_size, self._stop_ids)
            return self._vocabulary


class Matcher:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def forbidden(self) -> torch.Tensor:
        """Which tokens may not come next: bool [V]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size] == 0)

    def take(self, token: int) -> None:
        """Go on by a token, which must not be a forbidden one."""
        self._matcher.consume_token(token)


def _calls(request: ChatRequest) -> str:
    """A Lark grammar of one call, or of several, of the tools that may be called."""
    wanted = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
    kinds = []
    for tool in request.usable_tools:
        function = tool.function
        if wanted in (None, function.name):
            parameters = (function.model_extra or {}).get("parameters") or ANY_OBJECT
            properties = {"name": {"const": function.name}, "arguments": parameters}
            kind = {"type": "object", "properties": properties, "required": ["name", "arguments"]}
            kinds.append(kind | {"additionalProperties": False})
    schema = json.dumps({"x-guidance": BLANKS, "anyOf": kinds})
    several = "" if wanted is not None or request.parallel_tool_calls is False else ' ("\\n" call)*'
    return f'start: call{several}\ncall: <tool_call> "\\n" function "\\n" </tool_call>\nfunction: %json {schema}\n'
