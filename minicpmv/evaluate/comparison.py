"""What runs say beside each other, as cells for tables: figures with intervals, published ones, categories, costs, flips."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpmv.evaluate.pairing import PairingError, RowPair, pair_runs
from minicpmv.evaluate.published import ALL_ROWS, COLUMNS, MARKS, Column, caveats


COSTS = {
    "tokens": "tokens written",
    "prompt_tokens": "tokens read",
    "seconds": "seconds",
    "video": "frames",
    "cut_off": "cut off",
    "undecided": "undecided",
    "failed": "failed",
    "judge": "judge",
}


def percent(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def title_of(run: Mapping[str, Any]) -> str:
    return f"{run['settings'].get('benchmark')}, version {run['settings'].get('version')}"


def shown(value: float | None, spread: float | None = None, points: bool = False) -> str:
    """A figure: a share as a percentage, points as they are."""
    if not points or value is None:
        return percent(value, spread)
    return f"{value:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")


def facts(run: Mapping[str, Any]) -> dict[str, str]:
    """How a run was made, heading by heading."""
    settings = run["settings"]
    return {
        "model": run["model"],
        "weights": settings.get("weights") or settings.get("endpoint") or "-",
        "dtype": settings.get("dtype", "-"),
        "thinking": "as published" if settings.get("as_published") else thinking_in_words(settings.get("thinking")),
        "samples a row": " or ".join(map(str, sample_counts(run))),
        "seeds": ", ".join(map(str, run["seeds"])),
        "software": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        **(rules(run) if "scoring" in run else {}),
    }


def rules(run: Mapping[str, Any]) -> dict[str, str]:
    """How a public benchmark was asked and scored, heading by heading."""
    scoring, judge = run["scoring"], run["scoring"].get("judge")
    return {
        "asked": "as published" if run["settings"].get("as_published") else "plain",
        "rules": f"{scoring.get('version')}{', strict' if scoring.get('strict') else ''}",
        "judge": f"{judge.get('model')} at {judge.get('endpoint')}" if isinstance(judge, dict) else "none",
    }


def frames_in_words(shown: Mapping[str, Any]) -> str:
    """Which frames of videos were looked at, as the mean of a row."""
    packings = " to ".join(map(str, dict.fromkeys((shown["packing"][0], shown["packing"][-1]))))
    rate = f" at {shown['fps']:g} a second" if shown["fps"] else ""
    return f"{shown['frames']:.1f}{rate}, in groups of {packings}"


def sample_counts(run: Mapping[str, Any]) -> list[int]:
    """How many samples its rows have for each of their seeds, each number once."""
    return sorted({row["n"] // max(1, len(row.get("seeds") or run["seeds"])) for row in run["rows"].values()})


def thinking_in_words(thinking: Any) -> str:
    return (
        ", ".join(map(str, thinking))
        if isinstance(thinking, list)
        else {True: "on", False: "off"}.get(thinking, str(thinking))
    )


def labels_of(folders: Sequence[Path], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first of these that tells the runs apart: names of models, names of folders, whole paths."""
    models = [Path(run["model"]).name or run["model"] for run in runs]
    for names in (models, [folder.resolve().name for folder in folders]):
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def row_ids(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """All rows of all runs, in the order of the first run that has them."""
    return list(dict.fromkeys(row for run in runs for row in run["rows"]))


def cells(runs: Sequence[Mapping[str, Any]], row: str, metric: str, part: str) -> list[float | None]:
    """One value a run, None where a run lacks it; `part` is "mean" or "std"."""
    return [run["rows"].get(row, {}).get(part, {}).get(metric) for run in runs]


def main_metric(runs: Sequence[Mapping[str, Any]], row: str) -> tuple[str, bool]:
    """The first metric of a row, and whether low values are the better ones."""
    summary = next(run["rows"][row] for run in runs if row in run["rows"])
    return next(iter(summary["mean"])), summary["lower_is_better"]


def is_points(runs: Sequence[Mapping[str, Any]], row: str, metric: str) -> bool:
    """Whether a metric is no share."""
    return any(metric in run["rows"].get(row, {}).get("points", ()) for run in runs)


def compare(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the comparison: id, title, metric, texts of the cells and which of them are the best."""
    lines = []
    for row in row_ids(runs):
        summary = next(run["rows"][row] for run in runs if row in run["rows"])
        main, lower_is_better = main_metric(runs, row)
        for metric in summary["mean"]:
            values, spreads = cells(runs, row, metric, "mean"), cells(runs, row, metric, "std")
            points = metric in summary.get("points", ())
            known = [value for value in values if value is not None]
            best = (min if lower_is_better else max)(known) if len(set(known)) > 1 and metric == main else None
            lines.append(
                {
                    "id": row,
                    "title": summary["title"],
                    "lower_is_better": lower_is_better,
                    "metric": metric,
                    "is_main": metric == main,
                    "cells": [
                        {
                            "text": shown(value, spread, points),
                            "interval": interval_of(run, row, metric, points),
                            "best": best is not None and value == best,
                        }
                        for run, value, spread in zip(runs, values, spreads, strict=True)
                    ],
                }
            )
    return lines


def interval_of(run: Mapping[str, Any], row: str, metric: str, points: bool) -> str:
    """ "81.0 to 87.1", or nothing where a run has no interval."""
    found = run["rows"].get(row, {}).get("interval", {}).get(metric)
    return " to ".join(shown(value, None, points) for value in found) if found else ""


def beside_published(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The figures of the runs, and those that are published for the same rows; None where there are none."""
    rows = [(row, [row.own(run) for run in runs]) for row in ALL_ROWS]
    rows = [(row, own) for row, own in rows if any(own)]
    if not rows:
        return None
    columns = [column for column in COLUMNS if any(row.id in column.figures for row, _ in rows)]
    used = "".join(figure.mark for column in columns for row, _ in rows if (figure := column.figures.get(row.id)))
    return {
        "columns": [{"model": column.model, "mode": column.mode} for column in columns],
        "rows": [
            {
                "title": row.title,
                "lower_is_better": row.lower_is_better,
                "own": [value or "-" for value in own],
                "figures": [str(column.figures.get(row.id, "-")) for column in columns],
            }
            for row, own in rows
        ],
        "notes": [
            *dict.fromkeys(sentence for run in runs for sentence in caveats(run)),
            *(f"{mark} {meaning}." for mark, meaning in MARKS.items() if mark in used),
            *(f"{source}: {', '.join(models)}." for source, models in sources(columns).items()),
        ],
    }


def breakdowns(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The main metric of each row by what a data set says about its questions: categories, durations, tasks."""
    found = []
    for row in row_ids(runs):
        metric, _ = main_metric(runs, row)
        points = is_points(runs, row, metric)
        parts = [run["rows"].get(row, {}).get("by", {}) for run in runs]
        for fact in dict.fromkeys(fact for part in parts for fact in part):
            columns = [part.get(fact, {}) for part in parts]
            values = dict.fromkeys(value for column in columns for value in column)
            lines = [
                {
                    "value": value,
                    "n": max(column.get(value, {}).get("n", 0) for column in columns),
                    "cells": [shown(column.get(value, {}).get(metric), None, points) for column in columns],
                }
                for value in values
            ]
            found.append({"row": row, "fact": fact, "metric": metric, "lines": lines})
    return found


def sources(columns: Sequence[Column]) -> dict[str, list[str]]:
    """The models of each source, each once."""
    found: dict[str, list[str]] = {}
    for column in columns:
        models = found.setdefault(column.source, [])
        if column.model not in models:
            models.append(column.model)
    return found


def costs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What a question of each row took, and who decided, run by run; None where no run tells."""
    known = [name for name in COSTS if any(row.get(name) is not None for run in runs for row in run["rows"].values())]

    def text(run: Mapping[str, Any], row: str, name: str) -> str:
        value = run["rows"].get(row, {}).get(name)
        if value is None:
            return "-"
        if name == "judge" and (returned := run["rows"][row].get("judge_returned")):
            return ", ".join(dict.fromkeys([value, *returned]))
        if name == "video":
            return frames_in_words(value)
        if isinstance(value, (int, float)):
            return f"{value:.3g}" if name == "seconds" else f"{value:.0f}"
        return str(value)

    rows = [{"id": row, "cells": [[text(run, row, name) for name in known] for run in runs]} for row in row_ids(runs)]
    return {"names": [COSTS[name] for name in known], "rows": rows} if known else None


def pairs(labels: Sequence[str], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Each further run against the first, question by question."""
    found = []
    for label, folder in list(zip(labels, folders, strict=True))[1:]:
        try:
            rows = pair_runs(folders[0], folder)
        except PairingError:
            continue
        found.append({"first": labels[0], "second": label, "rows": [pair_cells(row) for row in rows]})
    return found


def pair_cells(row: RowPair) -> dict[str, str]:
    """The cells of a row that two runs share, heading by heading."""
    pairing = row.pairing
    return {
        "row": row.row,
        "n": str(pairing.questions),
        "first": percent(pairing.first),
        "second": percent(pairing.second),
        "difference": f"{100 * pairing.difference:+.1f}",
        "95 %": f"{100 * pairing.interval.low:+.1f} to {100 * pairing.interval.high:+.1f}",
        "lost": str(len(pairing.only_first)),
        "gained": str(len(pairing.only_second)),
        "p": f"{pairing.p:.2g}",
    }


def notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know before believing a difference."""
    asked = max(1, min((row["n"] for run in runs for row in run["rows"].values()), default=1))
    found = [
        f"Figures are percentages, unless they are said to be points. A share of right answers out of {asked} has a standard "
        f"error of up to {50 / math.sqrt(asked):.1f} points."
    ]
    if any(row.get("interval") for run in runs for row in run["rows"].values()):
        found.append("In small print: 95 % intervals, bootstrapped over questions.")
    if any(run["settings"].get("fixtures") for run in runs):
        found.append("Drawn questions stood in for the data (fixtures): these figures say nothing of a model.")
    if any(len(run["seeds"]) > 1 for run in runs):
        found.append("±: standard deviation over the seeds.")
    if len({(*sample_counts(run), "seeds", *run["seeds"]) for run in runs}) > 1:
        found.append("The runs were not asked about the same samples: see samples and seeds.")
    if any(summary["lower_is_better"] for run in runs for summary in run["rows"].values()):
        found.append("↓: the lower, the better.")
    return found
