"""How far a figure can be trusted, and whether two runs differ on the questions that both were asked.

What is special:
- intervals are percentile bootstraps (Efron, 1979) over what was drawn independently: questions, or groups of them, such as
  the rotations of a question or all questions about one video;
- two runs are compared question by question: what both get right, or both get wrong, says nothing about which is better.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

import numpy as np

from minicpmv.errors import MiniCPMVError


RESAMPLES, SEED = 2000, 0  # the same questions give the same interval, whenever they are asked
CONFIDENCE = 0.95

T = TypeVar("T")


class StatisticsError(MiniCPMVError):
    """Nothing can be said about these numbers: there are none, or they do not belong together."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def bootstrap(
    values: Sequence[T],
    statistic: Callable[[Sequence[T]], float | None],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """The interval of a statistic over resampled values.

    Args:
        values: one entry a question.
        statistic: of a list of values; None where these have none.
        groups: of each value; a group is drawn whole. None: every value is a group of its own.

    Returns:
        None where the statistic has no value for any resample. An interval of no width says that all values are alike, not
        that the figure is certain.

    Raises:
        StatisticsError: there are no values, or not a group for each.
    """
    members = _members(len(values), groups)
    generator = np.random.default_rng(SEED)
    found = []
    for _ in range(resamples):
        drawn = generator.integers(len(members), size=len(members))
        value = statistic([values[place] for group in drawn for place in members[group]])
        if value is not None:
            found.append(value)
    return _percentiles(found, confidence) if found else None


def bootstrap_mean(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """What `bootstrap` gives for the mean, in a fraction of its time.

    Raises:
        StatisticsError: as `bootstrap`.
    """
    members = _members(len(values), groups)
    sums = np.array([math.fsum(values[place] for place in group) for group in members])
    sizes = np.array([len(group) for group in members])
    generator = np.random.default_rng(SEED)
    means = []
    for _ in range(resamples):
        drawn = generator.integers(len(members), size=len(members))
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    return _percentiles(means, confidence)


def _members(count: int, groups: Sequence[Hashable] | None) -> list[list[int]]:
    """The places of each group's values, in the order in which groups first appear."""
    if not count:
        raise StatisticsError("there is not a single answer to take an interval of")
    if groups is None:
        return [[place] for place in range(count)]
    if len(groups) != count:
        raise StatisticsError(f"{count} answers came with {len(groups)} groups: give one for each")
    found: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(group, []).append(place)
    return list(found.values())


def _percentiles(values: Sequence[float], confidence: float) -> Interval:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p of McNemar's test (1947): how likely flips are to fall at least this unevenly by chance.

    Args:
        only_first, only_second: questions that just one of two runs has right.
    """
    flips = only_first + only_second
    tail = sum(math.comb(flips, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**flips)


@dataclass(frozen=True)
class Pairing:
    """The same questions, answered by two runs."""

    questions: int
    first: float  # mean score of each run
    second: float
    difference: float  # second minus first
    interval: Interval  # of the difference
    only_first: list[int]  # places of the questions that just this run has right (or scored higher)
    only_second: list[int]
    p: float  # McNemar's, over the questions that one of them has right


def pair(
    first: Sequence[float], second: Sequence[float], *, groups: Sequence[Hashable] | None = None, right: float = 0.5
) -> Pairing:
    """Compare two runs question by question.

    Args:
        first, second: the scores (0 to 1) of the same questions in the same order.
        groups: as in `bootstrap`.
        right: an answer counts as right from this score on, where scores are not just 0 and 1.

    Raises:
        StatisticsError: there are no questions, or the lists differ in length.
    """
    if len(first) != len(second):
        raise StatisticsError(f"{len(first)} and {len(second)} answers cannot be paired: take those to both")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    verdicts = [(a >= right, b >= right) for a, b in zip(first, second, strict=True)]
    interval = bootstrap_mean(differences, groups=groups)
    only_first = [place for place, (a, b) in enumerate(verdicts) if a and not b]
    only_second = [place for place, (a, b) in enumerate(verdicts) if b and not a]
    return Pairing(
        questions=len(first),
        first=fmean(first),
        second=fmean(second),
        difference=fmean(differences),
        interval=interval,
        only_first=only_first,
        only_second=only_second,
        p=mcnemar(len(only_first), len(only_second)),
    )
