"""Finds the threshold of `enable_thinking="auto"` for a checkpoint, and says what it gives on other questions.

What is special:
- both modes answer the same questions; what each threshold would have given follows from these answers
  (`threshold_curve`), so no threshold is tried by asking again;
- the choice is the threshold that generates fewest tokens while it keeps a share of the best accuracy of any threshold:
  always thinking is not always best, since a checkpoint may do worse where its thoughts lead nowhere;
- it is then put to the test with questions of the next seed, which the choice has not seen.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate import harness
from minicpmv.evaluate.answerers import LocalModel, Mode
from minicpmv.evaluate.benchmark import Benchmark
from minicpmv.evaluate.sample_log import SAMPLES_FILE, read_entries
from minicpmv.files import write_whole


if TYPE_CHECKING:
    from matplotlib.figure import Figure


CALIBRATION_FILE, CURVE_FILE = "calibration.json", "curve.png"
SCORE = "exact"  # of rows that can take part: whether an answer was right


class CalibrationError(MiniCPMVError):
    """The threshold cannot be found with these rows."""


def questions_in_both_modes(benchmark: Benchmark, rows: Sequence[str] | None) -> Benchmark:
    """The benchmark's rows, free to think or not.

    Of a pair of rows that differ in thinking alone, the one without is left out; so are controls, unless they are named.
    """
    chosen = [row for row in benchmark.choose(rows) if row.thinking is not False]
    if rows is None:
        chosen = [row for row in chosen if not row.lower_is_better and row.questions_per_sample == 1]
    if not chosen:
        raise CalibrationError(
            f"{', '.join(rows or ())}: the rows without thinking cannot be asked with it; name others"
        )
    return replace(benchmark, rows=tuple(replace(row, thinking=None) for row in chosen))


def answers(
    answerer: LocalModel,
    benchmark: Benchmark,
    output: Path,
    mode: Mode,
    *,
    name: str,
    samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The log's entries of one run, in the order of the questions."""
    harness.measure(answerer, benchmark, output, name=name, samples=samples, seeds=[seed], thinking=mode)
    places = {row.id: place for place, row in enumerate(benchmark.rows)}
    entries = [
        entry
        for entry in read_entries(output / SAMPLES_FILE)
        if entry["seed"] == seed and entry["row"] in places and entry["index"] < samples
    ]
    for entry in entries:
        if SCORE not in entry["scores"]:
            raise CalibrationError(f"{entry['row']} has no score {SCORE!r}: an answer has to be right or wrong")
    return sorted(entries, key=lambda entry: (places[entry["row"]], entry["index"]))


def column(entries: list[dict[str, Any]], name: str) -> list[float]:
    return [entry["scores"][SCORE] if name == SCORE else entry[name] for entry in entries]


@dataclass(frozen=True)
class ThresholdPoint:
    """What `enable_thinking="auto"` gives with one threshold, as means over questions."""

    threshold: float
    accuracy: float
    tokens: float  # generated for a question, drafts included
    deep_share: float  # questions that were thought about


def threshold_curve(
    need: Sequence[float],
    fast_correct: Sequence[float],
    deep_correct: Sequence[float],
    fast_tokens: Sequence[float],
    deep_tokens: Sequence[float],
    *,
    draft_tokens: int,
) -> list[ThresholdPoint]:
    """What each threshold would have given, from the same questions answered in both modes.

    Args:
        need: what "auto" compared with the threshold for each question (`ChatOutput.need`).
        fast_correct, deep_correct: whether, or how far (0 to 1), each mode was right.
        fast_tokens, deep_tokens: generated tokens of each mode.
        draft_tokens: most tokens of a draft (`model.draft_tokens`), which a thought pays on top.

    Returns:
        Points by rising threshold, from 0 (all deep) to 1 (all fast).

    Raises:
        CalibrationError: for lists of unequal length or none at all.
    """
    columns = (need, fast_correct, deep_correct, fast_tokens, deep_tokens)
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise CalibrationError(f"Every list needs one entry a question, but their lengths are {lengths}.")
    questions = sorted(zip(*columns, strict=True))
    total = len(questions)
    accuracy = sum(float(deep) for _, _, deep, _, _ in questions)
    tokens = sum(deep + min(fast, draft_tokens) for _, _, _, fast, deep in questions)
    curve = [ThresholdPoint(0.0, accuracy / total, tokens / total, 1.0)]
    for place, (score, fast_right, deep_right, fast, deep) in enumerate(questions):
        accuracy += float(fast_right) - float(deep_right)
        tokens += fast - deep - min(fast, draft_tokens)
        following = questions[place + 1][0] if place + 1 < total else 1.0
        if following > score or place + 1 == total:  # equal needs go the same way
            threshold = (score + following) / 2 if place + 1 < total else 1.0
            curve.append(ThresholdPoint(threshold, accuracy / total, tokens / total, 1 - (place + 1) / total))
    return curve


def choose(curve: Sequence[ThresholdPoint], keep: float) -> ThresholdPoint:
    """The point with the fewest tokens among those that keep the share `keep` of the best accuracy."""
    best = max(point.accuracy for point in curve)
    return min((point for point in curve if point.accuracy >= keep * best), key=lambda point: point.tokens)


def calibrate(
    answerer: LocalModel,
    benchmark: Benchmark,
    output: Path,
    *,
    name: str,
    rows: Sequence[str] | None = None,
    samples: int = 100,
    seed: int = 1,
    keep: float = 0.95,
) -> dict[str, Any]:
    """Set the model's threshold, and return what `calibration.json` in the folder `output` holds.

    Args:
        answerer: the model to calibrate.
        output: folder of the logs, the curve (`curve.png`) and the result; a run that was stopped goes on from it.
        name: what the model is called, for the record.
        rows: rows to ask; by default all that can be right or wrong, without controls.
        samples: questions of each row, once to choose (`seed`) and once to check (`seed` + 1).
        keep: share of the best accuracy of any threshold that has to stay.

    Returns:
        `threshold`; `curve`, a list of `ThresholdPoint` as dicts; `check`, for "deep", "fast" and "auto" the accuracy and
        the mean of generated tokens on the questions of `seed` + 1.

    Raises:
        CalibrationError: `keep` is out of range, or no row can be right or wrong in both modes.
        MiniCPMVError: whatever `measure` raises.
    """
    if not 0 < keep <= 1:
        raise CalibrationError(f"keep={keep} is not a share above 0 and up to 1")
    benchmark, model = questions_in_both_modes(benchmark, rows), answerer.model
    model.set_threshold(1.0)  # auto writes how it would decide, and answers fast
    deep = answers(answerer, benchmark, output / "deep", True, name=name, samples=samples, seed=seed)
    fast = answers(answerer, benchmark, output / "needs", "auto", name=name, samples=samples, seed=seed)
    by_mode = [column(entries, name) for name in (SCORE, "generated_tokens") for entries in (fast, deep)]
    curve = threshold_curve(column(fast, "need"), *by_mode, draft_tokens=model.draft_tokens)
    chosen = choose(curve, keep)

    check: dict[str, dict[str, float]] = {}
    model.set_threshold(chosen.threshold)
    modes: dict[str, Mode] = {"deep": True, "fast": False, "auto": "auto"}
    for mode, thinking in modes.items():
        folder = output / (mode if mode != "auto" else f"auto-{chosen.threshold:.4f}")
        entries = answers(answerer, benchmark, folder, thinking, name=name, samples=samples, seed=seed + 1)
        check[mode] = {"accuracy": fmean(column(entries, SCORE)), "tokens": fmean(column(entries, "generated_tokens"))}
        check[mode]["deep_share"] = fmean(entry["mode"] == "deep" for entry in entries)
    result = {
        "model": name,
        "threshold": chosen.threshold,
        "keep": keep,
        "rows": [row.id for row in benchmark.rows],
        "samples": samples,
        "seeds": {"chosen on": seed, "checked on": seed + 1},
        "check": check,
        "curve": [asdict(point) for point in curve],
    }
    write_whole(output / CALIBRATION_FILE, json.dumps(result, indent=1) + "\n")
    draw(result).savefig(output / CURVE_FILE, dpi=110)
    return result


def draw(result: dict[str, Any]) -> "Figure":
    """A matplotlib figure: accuracy over generated tokens for each threshold, and the three modes as they were checked."""
    from matplotlib.figure import Figure

    from minicpmv.evaluate.charts import STYLE, color_of

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    curve, check = result["curve"], result["check"]
    accuracies = [100 * point["accuracy"] for point in curve]
    label = f"thresholds 0 to 1, seed {result['seeds']['chosen on']}"
    axes.plot([point["tokens"] for point in curve], accuracies, color=color_of(0), linewidth=1.5, label=label)
    for place, (mode, marker) in enumerate((("fast", "o"), ("auto", "D"), ("deep", "s")), start=1):
        name = f"auto at {result['threshold']:.2f}" if mode == "auto" else mode
        axes.plot(
            check[mode]["tokens"],
            100 * check[mode]["accuracy"],
            marker,
            color=color_of(place),
            markersize=8,
            label=f"{name}, seed {result['seeds']['checked on']}",
        )
    axes.set_xlabel("generated tokens a question", **STYLE)
    axes.set_ylabel("right answers, %", **STYLE)
    axes.set_xlim(left=0)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="best")
    return figure
