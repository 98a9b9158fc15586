"""Statistics of figures: intervals that hold what they promise, and pairs of runs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from minicpmv.evaluate.benchmark import mean_of_each
from minicpmv.evaluate.statistics import StatisticsError, bootstrap_mean, bootstrap_metrics, mcnemar, pair


scores = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@settings(deadline=None)
@given(scores)
def test_an_interval_lies_within_the_scores_and_is_the_same_every_time(values):
    interval = bootstrap_mean(values, resamples=50)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    assert interval == bootstrap_mean(values, resamples=50)


@settings(deadline=None)
@given(scores)
def test_metrics_that_are_means_have_the_interval_of_a_mean(values):
    found = bootstrap_metrics({0: [{"exact": value} for value in values]}, mean_of_each, resamples=30)
    quick = bootstrap_mean(values, resamples=30)
    assert found["exact"].low == pytest.approx(quick.low) and found["exact"].high == pytest.approx(quick.high)


def test_ninety_five_of_a_hundred_intervals_hold_the_true_share():
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        interval = bootstrap_mean([float(right) for right in generator.random(100) < 0.7], resamples=300)
        inside += interval.low <= 0.7 <= interval.high
    assert 180 <= inside <= 199


def test_questions_that_hang_together_make_the_interval_wider():
    values = [float(video % 2) for video in range(10) for _ in range(20)]
    videos = [video for video in range(10) for _ in range(20)]
    apart, together = bootstrap_mean(values), bootstrap_mean(values, groups=videos)
    assert together.high - together.low > 3 * (apart.high - apart.low)


def circular(scores):
    """Of questions in rotations: all have to be right."""
    groups = {}
    for score in scores:
        groups.setdefault(score["facts"]["group"], []).append(score["exact"])
    return {
        "accuracy": sum(map(min, groups.values())) / len(groups),
        "rotations": sum(score["exact"] for score in scores) / len(scores),
    }


def test_a_group_that_is_drawn_twice_counts_twice():
    plain = [{"exact": float(number % 2), "facts": {}} for number in range(20)]
    groups = [score | {"facts": {"group": number // 2}} for number, score in enumerate(plain)]
    one_right = [score | {"exact": 1.0} if score["facts"]["group"] else score for score in groups]
    found = bootstrap_metrics({0: one_right}, circular)
    apart = bootstrap_mean([0.0] + [1.0] * 9)
    assert (found["accuracy"].low, found["accuracy"].high) == (apart.low, apart.high)


def test_several_runs_over_the_same_questions_narrow_the_interval_of_their_mean():
    generator = np.random.default_rng(2)
    runs = {seed: [{"exact": float(value)} for value in generator.random(100) < 0.5] for seed in range(4)}
    one = bootstrap_metrics({0: runs[0]}, mean_of_each)["exact"]
    four = bootstrap_metrics(runs, mean_of_each)["exact"]
    assert 1.5 < (one.high - one.low) / (four.high - four.low) < 2.6


def test_a_metric_without_a_value_has_no_interval():
    found = bootstrap_metrics({0: [{"exact": 1.0}] * 3}, lambda scores: {"exact": 1.0, "score": None}, resamples=5)
    assert set(found) == {"exact"}


@pytest.mark.parametrize(("values", "groups"), [([], None), ([1.0], ["a", "b"])])
def test_what_gives_no_interval_is_refused(values, groups):
    with pytest.raises(StatisticsError, match=r"not a single answer|1 answers came with 2 groups"):
        bootstrap_mean(values, groups=groups)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_two_sided_binomial_test(first, second):
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected) and mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_takes_more_flips_than_a_float_can_count():
    assert 0 < mcnemar(1900, 2100) < 0.01 and not math.isnan(mcnemar(2000, 2000))


def test_a_pair_names_the_questions_that_flipped_and_how_far_the_runs_are_apart():
    first, second = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]
    found = pair(first, second)
    assert (found.only_first, found.only_second, found.questions) == ([1, 3], [2], 4)
    assert (found.first, found.second, found.difference) == (0.75, 0.5, -0.25)
    assert found.interval.low < -0.25 < found.interval.high and found.p == 1.0


def test_scores_between_right_and_wrong_count_as_right_from_half_on():
    found = pair([0.4, 0.9], [0.6, 0.8])
    assert (found.only_first, found.only_second) == ([], [0]) and found.difference == pytest.approx(0.05)


def test_runs_of_other_questions_are_no_pair():
    with pytest.raises(StatisticsError, match="2 and 1 answers cannot be paired"):
        pair([1.0, 0.0], [1.0])
