"""Finds the threshold of `enable_thinking="auto"` for a checkpoint, and says what it gives on other questions.

What is special:
- both modes answer the same questions; what each threshold would have given follows from these answers
  (`threshold_curve`), so no threshold is tried by asking again;
- the choice is the threshold that generates fewest tokens while it keeps a share of the best accuracy of any threshold:
  always thinking is not always best, since a checkpoint may do worse where its thoughts lead nowhere;
- it is then put to the test with questions that the choice has not seen: those of the next seed where the repository draws
  them; of a data set, the other half of its questions. There, what "auto" gives follows from the answers in both modes;
- thoughts can be bounded as well: each budget is asked anew, since a thought that is cut short ends in another answer.
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
from minicpmv.evaluate.benchmark import Benchmark, Prompt, Row
from minicpmv.evaluate.sample_log import SAMPLES_FILE, read_entries
from minicpmv.files import write_whole


if TYPE_CHECKING:
    from matplotlib.figure import Figure


CALIBRATION_FILE, CURVE_FILE, TABLE_FILE = "calibration.json", "curve.png", "calibration.md"
SCORES = ("exact", "score")  # of rows that can take part: whether, or how far, an answer was right


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


def spread(benchmark: Benchmark, samples: int) -> Benchmark:
    """The benchmark with at most so many questions a row, evenly spaced: data sets are sorted by category."""
    return replace(benchmark, rows=tuple(_spread(row, samples) for row in benchmark.rows))


def _spread(row: Row, samples: int) -> Row:
    length = row.length or samples
    count = min(samples, length)
    places = [place * length // count for place in range(count)]
    return replace(row, length=count, sample=lambda seed, index: row.sample(seed, places[index]))


def with_budget(benchmark: Benchmark, budget: int) -> Benchmark:
    """The benchmark whose thoughts have at most so many tokens."""

    def bounded(row: Row) -> Row:
        def prompt(sample: Any) -> Prompt:
            found = row.prompt(sample)
            return replace(found, options=found.options | {"thinking_budget": budget})

        return replace(row, prompt=prompt)

    settings = benchmark.settings | {"thinking_budget": budget}
    return replace(benchmark, rows=tuple(map(bounded, benchmark.rows)), settings=settings)


def answers(
    answerer: LocalModel,
    benchmark: Benchmark,
    output: Path,
    mode: Mode,
    *,
    name: str,
    samples: int | None,
    seed: int,
) -> list[dict[str, Any]]:
    """The log's entries of one run, in the order of the questions."""
    harness.measure(answerer, benchmark, output, name=name, samples=samples, seeds=[seed], thinking=mode)
    places = {row.id: place for place, row in enumerate(benchmark.rows)}
    entries = [
        entry
        for entry in read_entries(output / SAMPLES_FILE)
        if entry["seed"] == seed and entry["row"] in places and (samples is None or entry["index"] < samples)
    ]
    for entry in entries:
        if score_of(entry) is None:
            raise CalibrationError(f"{entry['row']} has no score 'exact': an answer has to be right or wrong")
    return sorted(entries, key=lambda entry: (places[entry["row"]], entry["index"]))


def score_of(entry: dict[str, Any]) -> float | None:
    return next((entry["scores"][name] for name in SCORES if name in entry["scores"]), None)


def right(entries: Sequence[dict[str, Any]]) -> list[float]:
    return [score_of(entry) or 0.0 for entry in entries]


def tokens(entries: Sequence[dict[str, Any]]) -> list[float]:
    return [entry["generated_tokens"] for entry in entries]


def on_demand(
    fast: Sequence[dict[str, Any]], deep: Sequence[dict[str, Any]], threshold: float, draft_tokens: int
) -> list[dict[str, Any]]:
    """What "auto" gives, from the same questions in both modes: an entry each, a draft being paid for with each thought."""
    return [
        thought | {"generated_tokens": thought["generated_tokens"] + min(quick["generated_tokens"], draft_tokens)}
        if quick["need"] >= threshold
        else quick
        for quick, thought in zip(fast, deep, strict=True)
    ]


def means(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        "accuracy": fmean(right(entries)),
        "tokens": fmean(tokens(entries)),
        "deep_share": fmean(entry["mode"] == "deep" for entry in entries),
    }


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
    budgets: Sequence[int] = (),
) -> dict[str, Any]:
    """Set the model's threshold, and return what `calibration.json` in the folder `output` holds.

    Args:
        answerer: the model to calibrate.
        output: folder of the logs, the curve (`curve.png`), the table (`calibration.md`) and the result; a run that was
            stopped goes on from it.
        name: what the model is called, for the record.
        rows: rows to ask; by default all that can be right or wrong, without controls.
        samples: questions of each row to choose on, and as many again to check. Of a data set that has fewer, one half each.
        seed: of drawn questions to choose on; those to check are of `seed` + 1.
        keep: share of the best accuracy of any threshold, or of any budget, that has to stay.
        budgets: most tokens of a thought to try, with every question thought about.

    Returns:
        `threshold`; `curve`, a list of `ThresholdPoint` as dicts; `check`, for "deep", "fast" and "auto" the accuracy and
        the mean of generated tokens on the questions that the choice has not seen, and `rows`, the same for each row;
        `budgets` with the same for each of them, and the `budget` to take (None: no bound).

    Raises:
        CalibrationError: `keep` or a budget is out of range, or no row can be right or wrong in both modes.
        MiniCPMVError: whatever `measure` raises.
    """
    if not 0 < keep <= 1:
        raise CalibrationError(f"keep={keep} is not a share above 0 and up to 1")
    if wrong := [budget for budget in budgets if budget < 1]:
        raise CalibrationError(f"budget={wrong[0]} is not a number of tokens from 1 on")
    benchmark, model = questions_in_both_modes(benchmark, rows), answerer.model
    is_drawn = all(row.length is None for row in benchmark.rows)
    benchmark = benchmark if is_drawn else spread(benchmark, 2 * samples)
    count = samples if is_drawn else None  # None: all of what was spread

    def ask(folder: str, mode: Mode, seed: int, asked: Benchmark = benchmark) -> list[dict[str, Any]]:
        return answers(answerer, asked, output / folder, mode, name=name, samples=count, seed=seed)

    def half(entries: list[dict[str, Any]], place: int) -> list[dict[str, Any]]:
        return entries if is_drawn else [entry for entry in entries if entry["index"] % 2 == place]

    model.set_threshold(1.0)  # auto writes how it would decide, and answers fast
    all_deep, all_fast = ask("deep", True, seed), ask("needs", "auto", seed)
    fast, deep = half(all_fast, 0), half(all_deep, 0)
    need = [entry["need"] for entry in fast]
    curve = threshold_curve(
        need, right(fast), right(deep), tokens(fast), tokens(deep), draft_tokens=model.draft_tokens
    )
    chosen = choose(curve, keep)

    model.set_threshold(chosen.threshold)
    if is_drawn:
        checked = {
            "deep": ask("deep", True, seed + 1),
            "fast": ask("fast", False, seed + 1),
            "auto": ask(f"auto-{chosen.threshold:.4f}", "auto", seed + 1),
        }
    else:
        unseen = {"deep": half(all_deep, 1), "fast": half(all_fast, 1)}
        checked = unseen | {"auto": on_demand(unseen["fast"], unseen["deep"], chosen.threshold, model.draft_tokens)}
    tried: dict[int | None, dict[str, float]] = {None: means(deep)}
    for budget in budgets:
        tried[budget] = means(half(ask(f"budget-{budget}", True, seed, with_budget(benchmark, budget)), 0))
    best = max(found["accuracy"] for found in tried.values())
    enough = [budget for budget, found in tried.items() if found["accuracy"] >= keep * best]
    result = {
        "model": name,
        "benchmark": benchmark.id,
        "threshold": chosen.threshold,
        "keep": keep,
        "samples": samples,
        "chosen on": f"seed {seed}" if is_drawn else "every other question",
        "checked on": f"seed {seed + 1}" if is_drawn else "the questions between",
        "check": {mode: means(entries) for mode, entries in checked.items()},
        "rows": {
            row.id: {
                mode: means([entry for entry in entries if entry["row"] == row.id])
                for mode, entries in checked.items()
            }
            for row in benchmark.rows
        },
        "budget": min(enough, key=lambda budget: tried[budget]["tokens"]),
        "budgets": [{"budget": budget, **found} for budget, found in tried.items()],
        "curve": [asdict(point) for point in curve],
    }
    write_whole(output / CALIBRATION_FILE, json.dumps(result, indent=1) + "\n")
    write_whole(output / TABLE_FILE, as_markdown(result))
    draw(result).savefig(output / CURVE_FILE, dpi=110)
    return result


def as_markdown(result: dict[str, Any]) -> str:
    """Accuracy over tokens of the three modes, row by row, and of the budgets."""
    modes = ("fast", "auto", "deep")
    lines = [
        f"# Thinking on {result['benchmark']}: off, on demand, on",
        "",
        f"Chosen on {result['chosen on']}, checked on {result['checked on']}: threshold {result['threshold']:.4f}. Each cell: "
        "right answers in %, and generated tokens a question; of auto also how many questions it thought about, in %.",
        "",
        "| row | off | auto | on |",
        "|---|---:|---:|---:|",
    ]
    for row, found in [*result["rows"].items(), ("all", result["check"])]:
        cells = [f"{100 * found[mode]['accuracy']:.1f}, {found[mode]['tokens']:.0f}" for mode in modes]
        cells[1] += f", {100 * found['auto']['deep_share']:.0f}"
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    if len(result["budgets"]) > 1:
        lines += ["", "| most tokens of a thought | right, % | tokens a question |", "|---|---:|---:|"]
        for found in result["budgets"]:
            bound = "no bound" if found["budget"] is None else found["budget"]
            lines.append(f"| {bound} | {100 * found['accuracy']:.1f} | {found['tokens']:.0f} |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any]) -> "Figure":
    """A matplotlib figure: accuracy over generated tokens for each threshold, and the three modes as they were checked."""
    from matplotlib.figure import Figure

    from minicpmv.evaluate.charts import color_of, label_tokens

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    curve, check = result["curve"], result["check"]
    accuracies = [100 * point["accuracy"] for point in curve]
    label = f"thresholds 0 to 1, {result['chosen on']}"
    axes.plot([point["tokens"] for point in curve], accuracies, color=color_of(0), linewidth=1.5, label=label)
    for place, (mode, marker) in enumerate((("fast", "o"), ("auto", "D"), ("deep", "s")), start=1):
        name = f"auto at {result['threshold']:.2f}" if mode == "auto" else mode
        axes.plot(
            check[mode]["tokens"],
            100 * check[mode]["accuracy"],
            marker,
            color=color_of(place),
            markersize=8,
            label=f"{name}, {result['checked on']}",
        )
    budgets = [found for found in result["budgets"] if found["budget"] is not None]
    if budgets:
        axes.plot(
            [found["tokens"] for found in budgets],
            [100 * found["accuracy"] for found in budgets],
            "x",
            color=color_of(4),
            label=f"deep, within {' or '.join(str(found['budget']) for found in budgets)} tokens",
        )
    label_tokens(axes, "right answers, %")
    return figure
