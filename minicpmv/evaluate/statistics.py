"""How far a figure can be trusted, and whether two runs differ on the questions that both were asked.

What is special:
- intervals are percentile bootstraps (Efron, 1979) over what was drawn independently: questions, or groups of them, such as
  the rotations of a question or all questions about one video;
- two runs are compared question by question: what both get right, or both get wrong, says nothing about which is better.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.benchmark import Metrics, Scores


RESAMPLES, SEED = 1000, 0  # the same questions give the same interval, whenever they are asked
FEWEST_RESAMPLES, AFFORDABLE = 200, 3_000_000  # of large data sets: answers that are aggregated in some seconds
CONFIDENCE = 0.95
# What questions share that were not drawn independently: rotations of one question, pairs about one picture, the figures
# of a set, questions about one video. And whether metrics look at it, so that a group that is drawn twice has to be two.
TOGETHER = {"group": True, "picture": True, "set": True, "video": False}


class StatisticsError(MiniCPMVError):
    """Nothing can be said about these numbers: there are none, or they do not belong together."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def bootstrap_metrics(
    by_seed: Mapping[Any, Sequence[Scores]],
    aggregate: Callable[[list[Scores]], Metrics],
    *,
    resamples: int | None = None,
    confidence: float = CONFIDENCE,
) -> dict[str, Interval]:
    """The intervals of a row's metrics, of which `aggregate` may make anything, over resampled questions.

    Args:
        by_seed: the scores of each run over the same questions in the same order, with "facts" where the row has them.
            Questions that share one of the facts in `TOGETHER` are drawn together.
        aggregate: of one run's scores; the figure is the mean over runs.
        resamples: how often; by default as often as some seconds allow.

    Returns:
        An interval for each metric that has a value in every resample. One of no width says that all answers scored alike,
        not that the figure is certain.

    Raises:
        StatisticsError: there are no answers.
    """
    runs = list(by_seed.values())
    first = runs[0] if runs else []
    name = next((name for name in TOGETHER if name in first[0].get("facts", {})), None) if first else None
    groups = [_group(score, name) for score in first] if name else None
    members = _members(len(first), groups)
    if resamples is None:
        resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, AFFORDABLE // len(first)))
    generator = np.random.default_rng(SEED)
    found: dict[str, list[float | None]] = {}
    for _ in range(resamples):
        drawn = generator.integers(len(members), size=len(members))
        metrics = []
        for scores in runs:
            again = [
                _renamed(scores[place], name, number) if name and TOGETHER[name] else scores[place]
                for number, group in enumerate(drawn)
                for place in members[group]
            ]
            metrics.append(aggregate(again))
        for metric in metrics[0]:
            values = [each[metric] for each in metrics]
            known = [value for value in values if value is not None]
            found.setdefault(metric, []).append(fmean(known) if len(known) == len(values) else None)
    return {
        metric: _percentiles([value for value in values if value is not None], confidence)
        for metric, values in found.items()
        if None not in values and len(values) == resamples
    }


def _group(score: Scores, name: str) -> Hashable:
    return score["facts"].get("category"), score["facts"].get("l2_category"), str(score["facts"].get(name))


def _renamed(score: Scores, name: str, number: int) -> Scores:
    """A score of a group that may be drawn more than once: each time it is another group to those who look at groups."""
    return score | {"facts": score["facts"] | {name: f"{score['facts'].get(name)} (draw {number})"}}


def bootstrap_mean(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The interval of a mean.

    Args:
        groups: of each value; a group is drawn whole. None: every value is a group of its own.

    Raises:
        StatisticsError: there are no values, or not a group for each.
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
        groups: as in `bootstrap_mean`.
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
