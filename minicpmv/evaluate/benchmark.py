"""What a benchmark is: rows of (samples, prompt, scorer, aggregate).

What is special:
- a sample is made from (seed, index) when its turn comes, so a benchmark can be endless, and a resumed run draws only
  what is missing; a data set of fixed size gives its entry `index` and states its length;
- the scorer sees the answer and what was expected, never the image: it can be tested on answers made by hand, and answers
  in a log can be scored again by other rules without asking anyone;
- what aggregates, breakdowns and reports need to know about a question (its category, its group, its part of the data)
  is logged beside the answer as its *facts*: figures follow from the log alone;
- where rules do not decide, a row declares a [`Judge`]: what to ask a language model after all answers are there, and how
  to read its reply;
- metrics are shares (0 to 1), but for those that a row names as `points`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from minicpmv.errors import MiniCPMVError


# What the scorer says about one answer, for JSON. The first entry is its main score, 0 to 1, called "exact" where nothing
# lies between right and wrong, else "score" (None: it cannot be known here). "extracted" is what was read out of the
# answer; "undecided" is true where the rules found nothing and a judge may; "judged" where one has spoken.
Scores = dict[str, Any]
Facts = dict[str, Any]  # what the data set says about a question, for JSON
Entry = dict[str, Any]  # a line of the log: question, expected, answer, facts, scores, ... (see harness)
Metrics = dict[str, float | None]  # what a row reports; None where nothing could be counted


ENDLESS_SAMPLES = 100  # of each row and seed, where samples have no end and nobody says how many


class UnknownRowError(MiniCPMVError):
    """A row was asked for that the benchmark does not have, or that does not allow what was asked."""


class SampleCountError(MiniCPMVError):
    """More samples were asked for than there are, or fewer than one, or the same ones twice."""


@dataclass(frozen=True)
class Prompt:
    """One question to the model, with what a right answer is."""

    content: list[Any]  # of the user's message: images, videos and strings, as the model's chat() takes them
    expected: Any  # for the scorer and the log: anything that JSON can hold
    # Of chat(): max_slice_nums, temporal_ids, use_image_id, fps, ...; decoding is greedy unless they say otherwise.
    # And "think_prefix": words that open the thought.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subtitles:
    """A part of a prompt's text that depends on which frames of the video are shown: whoever answers chooses them."""

    lines: tuple[tuple[float, float, str], ...]  # (from, to, text), in seconds
    before: str = ""  # stand around the lines, where there are any
    after: str = ""

    def shown_at(self, seconds: Sequence[float]) -> str:
        """The lines on screen at these times, one below the other, each once."""
        shown = [text for start, end, text in self.lines if any(start <= time <= end for time in seconds)]
        return f"{self.before}{chr(10).join(shown)}{self.after}" if shown else ""


@dataclass(frozen=True)
class Judge:
    """What a language model is asked about answers that rules alone do not score."""

    model: str  # the one that the reference takes
    applies: Callable[[Entry], bool]  # whether it is asked about this answer
    messages: Callable[[Entry], list[dict[str, Any]]]  # of the request, in OpenAI's form
    read: Callable[[str, Entry], Scores | None]  # the answer's scores by the reply; None: it says nothing, ask again
    give_up: Callable[[Entry], Scores]  # the scores after the last try
    tries: int = 3
    temperatures: tuple[float, ...] = (0.0,)  # of the tries; the last one goes for the rest
    max_tokens: int = 128
    required: bool = False  # whether the figure means nothing beside published ones without a judge


def mean_of_each(scores: list[Scores]) -> Metrics:
    """The mean of every score over all answers."""
    return {name: fmean(score[name] for score in scores) for name in scores[0]}


def main_score(scores: Mapping[str, Any]) -> float | None:
    """The score of one answer that stands for all of them: the first."""
    return next(iter(scores.values()), None)


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table."""

    id: str
    title: str  # what is asked, in a few words
    sample: Callable[[int, int], Any]  # (seed, index) -> sample
    prompt: Callable[[Any], Prompt]
    scorer: Callable[[str, Any], Scores]  # (stripped answer without its thought, expected) -> scores
    # The first metric is the row's main one. Where the row has facts, each answer's scores hold them as "facts".
    aggregate: Callable[[list[Scores]], Metrics] = mean_of_each
    max_new_tokens: int = 64  # of the answer; above the longest right one, so that none is cut to fit
    max_thought_tokens: int = 1024  # more of them, where the row thinks
    thinking: bool | None = None  # whether the model thinks first; None: as the run is set
    lower_is_better: bool = False
    questions_per_sample: int = 1
    length: int | None = None  # how many samples there are; None: without end
    facts: Callable[[Any], Facts] | None = None  # what is logged about a sample
    expected: Callable[[Any], Any] | None = None  # what is right, where a sample's prompt cannot be made
    cut: Callable[[str], str] | None = None  # takes from the answer the part that is scored
    judge: Judge | None = None
    breakdowns: tuple[str, ...] = ()  # facts by whose values the metrics are also given
    points: tuple[str, ...] = ()  # metrics that are no shares
    upload: Callable[[list[Entry], Path], None] | None = None  # writes a file for those who know the answers
    runs: int = 1  # how many seeds a run takes unless it is told

    def count(self, samples: int | None) -> int:
        """How many samples a run takes: `samples`, or where that is None all there are, or 100 of an endless row.

        Raises:
            SampleCountError: there are not as many.
        """
        if samples is None:
            return self.length or ENDLESS_SAMPLES
        if not 1 <= samples <= (self.length or samples):
            raise SampleCountError(
                f"{samples} samples were asked for; {self.id} has 1 to {self.length or 'any number'}"
            )
        return samples


@dataclass(frozen=True)
class Benchmark:
    id: str
    title: str
    version: int  # counted up with every change of samples, prompts or scorers: logs of another version are not mixed
    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)  # more that answers depend on, for JSON
    scoring: dict[str, Any] | None = None  # how answers are scored, where there is more than one way

    def choose(self, ids: Sequence[str] | None) -> list[Row]:
        """The rows with these ids in the benchmark's own order; all of them for None.

        Raises:
            UnknownRowError: names the rows that exist.
        """
        known = [row.id for row in self.rows]
        if unknown := [name for name in ids or () if name not in known]:
            raise UnknownRowError(f"{self.id} has no row {', '.join(unknown)}; its rows are {', '.join(known)}")
        return [row for row in self.rows if ids is None or row.id in ids]
