"""What a benchmark is: rows of (samples, prompt, scorer, aggregate).

What is special:
- a sample is made from (seed, index) when its turn comes, so a benchmark can be endless, and a resumed run draws only
  what is missing; a data set of fixed size gives its entry `index` and states its length;
- the scorer sees the answer and what was expected, never the image: it can be tested on answers made by hand;
- all metrics are shares (0 to 1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from minicpmv.errors import MiniCPMVError


Scores = dict[str, float]  # what the scorer says about one answer
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
    options: dict[str, Any] = field(default_factory=dict)


def mean_of_each(scores: list[Scores]) -> Metrics:
    """The mean of every score over all answers."""
    return {name: fmean(score[name] for score in scores) for name in scores[0]}


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table."""

    id: str
    title: str  # what is asked, in a few words
    sample: Callable[[int, int], Any]  # (seed, index) -> sample
    prompt: Callable[[Any], Prompt]
    scorer: Callable[[str, Any], Scores]  # (stripped answer without its thought, expected) -> scores
    aggregate: Callable[[list[Scores]], Metrics] = mean_of_each  # the first metric is the row's main one
    max_new_tokens: int = 64  # of the answer; above the longest right one, so that none is cut to fit
    max_thought_tokens: int = 1024  # more of them, where the row thinks
    thinking: bool | None = None  # whether the model thinks first; None: as the run is set
    lower_is_better: bool = False
    questions_per_sample: int = 1
    length: int | None = None  # how many samples there are; None: without end

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

    def choose(self, ids: Sequence[str] | None) -> list[Row]:
        """The rows with these ids in the benchmark's own order; all of them for None.

        Raises:
            UnknownRowError: names the rows that exist.
        """
        known = [row.id for row in self.rows]
        if unknown := [name for name in ids or () if name not in known]:
            raise UnknownRowError(f"{self.id} has no row {', '.join(unknown)}; its rows are {', '.join(known)}")
        return [row for row in self.rows if ids is None or row.id in ids]
