"""Who answers the questions of a benchmark: what the harness asks of anyone, and the model in this process.

An answerer is any object with the attributes of [`Answerer`]; [`minicpmv.evaluate.endpoint.Endpoint`] is the other one here.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from typing import Any, Literal, Protocol

from minicpmv.evaluate.benchmark import Prompt, Row
from minicpmv.evaluate.sample_log import SampleKey


GREEDY = {"decoding": "greedy"}
# Questions held in memory to be shared out to batches by their options, as a number of batches: with more of them, rows
# of mixed options fill their batches better, but large images soon take a gigabyte.
BATCHES_IN_MEMORY = 2

Mode = bool | Literal["auto"]  # whether to think first; "auto": where the model's own need asks for it


@dataclass
class Question:
    """One question of a row. Its prompt, with its images, is made when it is first looked at."""

    key: SampleKey
    row: Row
    answered: bool = False  # by an earlier run: to be asked again only where the answers of others depend on it

    @cached_property
    def prompt(self) -> Prompt:
        return self.row.prompt(self.row.sample(self.key.seed, self.key.index))


@dataclass(frozen=True)
class Answer:
    text: str  # without the thought
    thought: str | None = None  # None where the model did not think
    finish_reason: str | None = None  # "stop"; "length": max_new_tokens were reached
    prompt_tokens: int | None = None
    generated_tokens: int | None = None  # of thought and answer, with all that was thrown away
    mode: str | None = None  # "deep" or "fast", where the answerer knows
    need: float | None = None  # what "auto" compared with the threshold


class Answerer(Protocol):
    """Anyone who answers questions."""

    window: int  # how many questions it wants to see at a time
    versions: dict[str, str]  # of the software that answers, for the record

    def settings(self, mode: Mode | Sequence[str]) -> dict[str, Any]:
        """Everything that answers depend on apart from the question, for JSON; `mode` is that of the whole run."""

    def answer(
        self, questions: Sequence[Question], mode: Mode, max_new_tokens: int
    ) -> Iterator[tuple[Question, Answer]]:
        """Answers to at least the questions that are not `answered`, each as soon as it is there, in any order."""


class LocalModel:
    """A model in this process, asked in batches through its own `chat()`.

    A batch depends on the questions alone, never on which of them have been answered: a run that was killed and resumed
    asks in the same batches and ends with the same answers as one that ran through.

    Args:
        model, processor: as `minicpmv.load` returns them. The weights' fingerprint is taken once: make a new answerer when
            they have changed.
        batch_size: questions asked at once.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 50):
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.window = batch_size * BATCHES_IN_MEMORY
        self.versions = {name: version(name) for name in ("torch", "transformers")}

    @cached_property
    def weights(self) -> str:
        """The fingerprint of the model's weights."""
        from minicpmv.evaluate.fingerprint import weights_fingerprint

        return weights_fingerprint(self.model)

    def settings(self, mode: Mode | Sequence[str]) -> dict[str, Any]:
        """Fingerprints of the weights and of the processor: a checkpoint that was trained on is another setting."""
        parts = [
            self.processor.chat_template,
            self.processor.image_processor.to_dict(),
            self.processor.video_processor.to_dict(),
            self.processor.tokenizer.get_vocab(),
        ]
        return {
            "weights": self.weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "processor": hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16],
            **({"threshold": self.model.thinking_threshold} if mode == "auto" else {}),
        }

    def answer(
        self, questions: Sequence[Question], mode: Mode, max_new_tokens: int
    ) -> Iterator[tuple[Question, Answer]]:
        if all(question.answered for question in questions):
            return
        for batch in batches(questions, self.batch_size):
            if not all(question.answered for question in batch):
                yield from zip(batch, self._chat(batch, mode, max_new_tokens), strict=True)

    def _chat(self, batch: Sequence[Question], mode: Mode, max_new_tokens: int) -> list[Answer]:
        import torch

        options = dict(batch[0].prompt.options)
        if "temporal_ids" in options:
            options["temporal_ids"] = [question.prompt.options["temporal_ids"] for question in batch]
        with torch.inference_mode():
            outputs = self.model.chat(
                msgs=[[{"role": "user", "content": question.prompt.content}] for question in batch],
                processor=self.processor,
                enable_thinking=mode,
                max_new_tokens=max_new_tokens,
                return_dict=True,
                **GREEDY | options,
            )
        return [
            Answer(
                text=output.text.strip(),
                thought=output.reasoning,
                finish_reason=output.finish_reason,
                prompt_tokens=output.prompt_tokens,
                generated_tokens=output.generated_tokens + output.draft_tokens,
                mode=output.mode,
                need=output.need,
            )
            for output in outputs
        ]


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions in batches of at most `size`, those with equal options together.

    Images are not sorted by size: the tower packs slices without padding, and sorting was no faster.
    """
    for _, group in groupby(sorted(questions, key=_shared_options), key=_shared_options):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _shared_options(question: Question) -> str:
    """What has to be the same in a batch; temporal ids differ from clip to clip."""
    options = question.prompt.options
    return repr(sorted({**options, "temporal_ids": "temporal_ids" in options}.items()))
