"""Which token comes next in one row of a batch: the settings of its request, and numbers of its own.

What is special:
- A row depends on its own scores and its own seed, not on the rows beside it.
- The order is that of `generate`: penalties, bias and grammar, then temperature, top_k, top_p and min_p, then the choice.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minicpmv.serving.grammar import Matcher
from minicpmv.serving.schema import GenerationRequest, RequestError


LEAST_TEMPERATURE = 0.01  # below it the likeliest token is taken: scores divided by less may overflow


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen."""

    temperature: float | None = None  # None: the likeliest token
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None  # how many of the likeliest are told besides the chosen one; None: nothing is told

    @classmethod
    def of(cls, request: GenerationRequest, defaults: Any, vocab_size: int) -> "Sampling":
        """Those of a request; what it leaves out is that of the model's generation_config (`defaults`).

        Raises:
            RequestError: `logit_bias` names a token that is none.
        """
        for token in request.logit_bias or ():
            if not 0 <= token < vocab_size:
                raise RequestError(f"logit_bias: {token} is no token; there are {vocab_size}.", param="logit_bias")

        def chosen(name: str) -> Any:
            own = getattr(request, name)
            return getattr(defaults, name, None) if own is None else own

        samples = defaults.do_sample if request.temperature is None else request.temperature >= LEAST_TEMPERATURE
        temperature = (1.0 if (given := chosen("temperature")) is None else given) if samples else None
        told = (getattr(request, "top_logprobs", None) or 0) if getattr(request, "logprobs", None) else None
        return cls(
            temperature=temperature,
            top_p=chosen("top_p"),
            top_k=chosen("top_k"),
            min_p=chosen("min_p"),
            repetition_penalty=chosen("repetition_penalty"),
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            logit_bias=request.logit_bias or {},
            seed=request.seed,
            logprobs=told,
        )

    def of_choice(self, index: int) -> int | str:
        """The seed of one of several answers to a request; the first has the seed of a request for one."""
        seed = random.getrandbits(62) if self.seed is None else self.seed
        return seed if index == 0 else f"{seed}/{index}"


@dataclass(eq=False)
class CountPenalty(LogitsProcessor):
    """OpenAI's penalties on tokens of the answer, by how often they stand there and for standing there at all."""

    frequency: float
    presence: float
    prompt_length: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, counts = torch.unique(input_ids[0, self.prompt_length :], return_counts=True)
        scores[:, tokens] -= self.frequency * counts + self.presence
        return scores


class Sampler:
    """Chooses the tokens of one row.

    Args:
        room: most tokens of the answer.
        budget: a processor of `generate` that bounds the thought, or None.
        matcher: follows the answer through a grammar, or None.
        closing: the tokens that close the thought with which the answer begins; then the grammar counts.
    """

    def __init__(
        self,
        model: Any,
        settings: Sampling,
        choice: int,
        prompt: list[int],
        room: int,
        budget: LogitsProcessor | None = None,
        matcher: Matcher | None = None,
        closing: Sequence[int] = (),
        think_end: int | None = None,
    ) -> None:
        self.settings, self._matcher, self._think_end = settings, matcher, think_end
        # What closes a thought goes on behind its tag, with tokens that are no part of the form.
        self._in_thought = bool(closing)
        self._tail = list(closing[list(closing).index(think_end) + 1 :]) if closing and think_end is not None else []
        self._before: list[Any] = []
        if settings.logit_bias:
            bias = [[[token], value] for token, value in settings.logit_bias.items()]
            self._before.append(SequenceBiasLogitsProcessor(bias))
        if settings.repetition_penalty not in (None, 1.0):
            self._before.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if settings.frequency_penalty or settings.presence_penalty:
            self._before.append(CountPenalty(settings.frequency_penalty, settings.presence_penalty, len(prompt)))
        if budget is not None:
            self._before.append(budget)
        self._after: list[Any] = []
        if settings.temperature is not None:
            if settings.temperature != 1.0:
                self._after.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k is not None and settings.top_k > 0:
                self._after.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p is not None and settings.top_p < 1.0:
                self._after.append(TopPLogitsWarper(settings.top_p))
            if settings.min_p:
                self._after.append(MinPLogitsWarper(settings.min_p))
            self._after.append(model.seeded_choice([settings.of_choice(choice)], len(prompt)))
        self._length = len(prompt)
        self._ids: Tensor | None = None  # [1, prompt + room], filled as far as it is known
        if self._before or self._after:
            self._ids = torch.tensor([[*prompt, *[0] * room]], device=model.device)

    @property
    def is_plain(self) -> bool:
        """Whether it takes the likeliest token of the scores as they are, so that all such rows are asked at once."""
        return self._ids is None and self._matcher is None

    def choose(self, logits: Tensor) -> int:
        """The next token, by the logits [V] of the model."""
        scores = logits[None].float().clone()
        ids: Any = None if self._ids is None else self._ids[:, : self._length]
        for process in self._before:
            scores = process(ids, scores)
        if self._matcher is not None and not self._in_thought:
            forbidden = self._matcher.forbidden()
            forbidden[self._tail[:1]] = False
            scores = scores.masked_fill(forbidden.to(scores.device), -torch.inf)
        for process in self._after:
            scores = process(ids, scores)
        return int(scores.argmax())

    def take(self, token: int) -> None:
        """Go on by a token."""
        if self._ids is not None:
            self._ids[0, self._length] = token
            self._length += 1
        if self._in_thought:
            self._in_thought = token != self._think_end
        elif self._tail[:1] == [token]:
            del self._tail[0]
        elif self._matcher is not None:
            self._tail = []
            self._matcher.take(token)


def log_probabilities(logits: Tensor, token: int, most: int) -> tuple[float, list[tuple[int, float]]]:
    """The logarithm of the probability of a token by the logits [V], and the likeliest tokens with theirs."""
    values = logits.float().log_softmax(-1)
    found = values.topk(most) if most else None
    likeliest = [] if found is None else list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
    return values[token].item(), likeliest
