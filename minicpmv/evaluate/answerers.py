"""Who answers the questions of a benchmark: what the harness asks of anyone, and the model in this process.

An answerer is any object with the attributes of [`Answerer`]; [`minicpmv.evaluate.endpoint.Endpoint`] is the other one here.
"""

import copy
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from typing import Any, Literal, Protocol

from minicpmv.errors import MiniCPMVError, is_expected
from minicpmv.evaluate.benchmark import Prompt, Row, Subtitles
from minicpmv.evaluate.sample_log import SampleKey


GREEDY = {"decoding": "greedy"}
# Questions held in memory to be shared out to batches by their options, as a number of batches: with more of them, rows
# of mixed options fill their batches better, but large images soon take a gigabyte.
BATCHES_IN_MEMORY = 2

Mode = bool | Literal["auto"]  # whether to think first; "auto": where the model's own need asks for it


class AnswerError(MiniCPMVError):
    """A question cannot be put to this model."""


class QuestionError(MiniCPMVError):
    """One question cannot be asked, for reasons of its own: others may."""

    def __init__(self, question: "Question", reason: BaseException | str):
        super().__init__(f"{question.name}: {reason}")
        self.question = question


@dataclass
class Question:
    """One question of a row. Its prompt, with its images, is made when it is first looked at."""

    key: SampleKey
    row: Row
    answered: bool = False  # by an earlier run: to be asked again only where the answers of others depend on it

    @cached_property
    def sample(self) -> Any:
        return self.row.sample(self.key.seed, self.key.index)

    @cached_property
    def prompt(self) -> Prompt:
        """Raises QuestionError where it cannot be made: a video is missing, an image is broken."""
        with asking(self):
            return self.row.prompt(self.sample)

    @property
    def name(self) -> str:
        return f"question {self.key.index} of {self.key.row} (seed {self.key.seed})"


@contextmanager
def asking(question: Question) -> Iterator[None]:
    """Says of which question an expected error is."""
    try:
        yield
    except ValueError as error:
        if not is_expected(error) or isinstance(error, QuestionError):
            raise
        raise QuestionError(question, error) from error


@dataclass(frozen=True)
class Answer:
    text: str  # without the thought
    thought: str | None = None  # None where the model did not think
    finish_reason: str | None = None  # "stop"; "length": max_new_tokens were reached
    prompt_tokens: int | None = None
    generated_tokens: int | None = None  # of thought and answer, with all that was thrown away
    mode: str | None = None  # "deep" or "fast", where the answerer knows
    need: float | None = None  # what "auto" compared with the threshold
    media: dict[str, Any] | None = None  # of a video: which frames were looked at, and how they were packed
    seconds: float | None = None  # for this answer; of a batch, its share
    error: str | None = None  # why the question could not be asked


class Answerer(Protocol):
    """Anyone who answers questions."""

    window: int  # how many questions it wants to see at a time
    versions: dict[str, str]  # of the software that answers, for the record

    def settings(self, mode: Mode | Sequence[str]) -> dict[str, Any]:
        """Everything that answers depend on apart from the question, for JSON; `mode` is that of the whole run."""

    def answer(
        self, questions: Sequence[Question], mode: Mode, max_new_tokens: int
    ) -> Iterator[tuple[Question, Answer]]:
        """Answers to at least the questions that are not `answered`, each as soon as it is there, in any order.

        Raises:
            QuestionError: one of them cannot be asked. It names the question; without it the others can be asked again.
        """


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
        self.versions |= getattr(getattr(model, "llm", None), "versions", {})  # of what runs in other software
        self._video: Any = None  # the one looked at last: path, options, frames

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
                yield from self._answer(batch, mode, max_new_tokens)

    def _answer(self, batch: Sequence[Question], mode: Mode, max_new_tokens: int) -> Iterator[tuple[Question, Answer]]:
        """Answers to a batch; where it cannot be asked, one by one up to the question that is to blame."""
        if len(batch) == 1:
            with asking(batch[0]):
                answers = self._chat(batch, mode, max_new_tokens)
            yield batch[0], answers[0]
            return
        try:
            answers = self._chat(batch, mode, max_new_tokens)
        except ValueError as error:
            if not is_expected(error):
                raise
            for question in batch:
                yield from self._answer([question], mode, max_new_tokens)
        else:
            yield from zip(batch, answers, strict=True)

    def _chat(self, batch: Sequence[Question], mode: Mode, max_new_tokens: int) -> list[Answer]:
        import torch

        started = time.perf_counter()
        asked = [self._with_frames(question.prompt) for question in batch]
        options = dict(asked[0][0].options)
        for name in ("temporal_ids", "seed"):  # each question's own
            if name in options:
                options[name] = [prompt.options[name] for prompt, _ in asked]
        prefix = options.pop("think_prefix", "")
        with torch.inference_mode():
            outputs = self.model.chat(
                msgs=[[{"role": "user", "content": prompt.content}] for prompt, _ in asked],
                processor=self._beginning_thoughts_with(prefix) if prefix else self.processor,
                enable_thinking=mode,
                max_new_tokens=max_new_tokens,
                return_dict=True,
                **GREEDY | options,
            )
        seconds = (time.perf_counter() - started) / len(batch)
        return [
            Answer(
                text=output.text.strip(),
                thought=output.reasoning if output.reasoning is None or not prefix else f"{prefix} {output.reasoning}",
                finish_reason=output.finish_reason,
                prompt_tokens=output.prompt_tokens,
                generated_tokens=output.generated_tokens + output.draft_tokens,
                mode=output.mode,
                need=output.need,
                media=media,
                seconds=seconds,
            )
            for output, (_, media) in zip(outputs, asked, strict=True)
        ]

    def _with_frames(self, prompt: Prompt) -> tuple[Prompt, dict[str, Any] | None]:
        """The prompt with the frames of its video in the video's place, and what is to be known about them."""
        videos = [part["video"] for part in prompt.content if is_video(part)]
        if not videos:
            return prompt, None
        if len(videos) > 1:
            raise AnswerError(f"a question shows {len(videos)} videos; one can be looked at")
        reader = self.processor.video_processor
        options = {name: value for name, value in prompt.options.items() if name in reader.option_names}
        if self._video is None or self._video[:2] != (
            videos[0],
            options,
        ):  # questions about one video follow each other
            self._video = (videos[0], options, reader.sample_video(videos[0], **options))
        frames, groups, report = (getattr(self._video[2], name) for name in ("frames", "temporal_ids", "metadata"))
        content: list[Any] = []
        for part in prompt.content:
            if is_video(part):
                content += frames
            elif isinstance(part, Subtitles):
                content += [text] if (text := part.shown_at(report.timestamps)) else []
            else:
                content.append(part)
        settings = reader.options(**options)
        rest = {name: value for name, value in prompt.options.items() if name not in reader.option_names}
        rest |= {"max_slice_nums": settings.max_slice_nums, "use_image_id": settings.use_image_id}
        media = {
            "fps": settings.fps,
            "frames": len(frames),
            "packing": report.packing,
            "groups": report.num_groups,
            "tokens": report.num_tokens,
            "seconds": round(report.duration, 3),
            "timestamps": [round(time, 2) for time in report.timestamps],
        }
        return Prompt(content, prompt.expected, rest | {"temporal_ids": groups}), media

    def _beginning_thoughts_with(self, prefix: str) -> Any:
        """The processor, with a chat template whose opened thought has a first word already."""
        opening = "{{- '<think>\\n' }}"
        template = self.processor.tokenizer.chat_template
        if opening not in template:
            raise AnswerError(
                f"the chat template does not open thoughts with {opening}: leave as-published settings away"
            )
        processor = copy.copy(self.processor)
        processor.tokenizer = copy.copy(self.processor.tokenizer)
        processor.tokenizer.chat_template = template.replace(opening, opening.replace("\\n", f"\\n{prefix}"))
        return processor


def is_video(part: Any) -> bool:
    """Whether a part of a message is a video."""
    return isinstance(part, Mapping) and part.get("type") == "video"


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions in batches of at most `size`, those with equal options together.

    Images are not sorted by size: the tower packs slices without padding, and sorting was no faster.
    """
    for _, group in groupby(sorted(questions, key=_shared_options), key=_shared_options):
        alike = list(group)
        step = 1 if any(map(is_video, alike[0].prompt.content)) else size  # hundreds of frames are enough at once
        yield from (alike[start : start + step] for start in range(0, len(alike), step))


def _shared_options(question: Question) -> str:
    """What has to be the same in a batch; temporal ids differ from clip to clip, and each question may have its seed."""
    options = question.prompt.options
    own = {name: name in options for name in ("temporal_ids", "seed")}
    return repr(sorted({**options, **own}.items()))
