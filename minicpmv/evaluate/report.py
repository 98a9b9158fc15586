"""Runs side by side in HTML, Markdown or CSV: figures with their intervals, published ones beside them, what they cost,
which questions flipped, charts, and the first mistakes of each.

What is special:
- an HTML report is one file: charts and images stand in it;
- runs are compared as they are; where they were asked about other samples, or not as the published figures were made, the
  report says so;
- what models wrote, and what files of runs hold, is shown as text: no link, image or tag in it comes alive.
"""

import base64
import csv
import glob
import io
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.benchmark import main_score
from minicpmv.evaluate.harness import RESULTS_FILE
from minicpmv.evaluate.pairing import PairingError, pair_runs
from minicpmv.evaluate.published import ALL_ROWS, COLUMNS, MARKS, caveats
from minicpmv.evaluate.sample_log import read_scored
from minicpmv.files import DamagedFileError, check_writable, read_json


if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISTAKES = 3  # shown for each row and run
PICTURES = "pictures"  # the folder of a run's, and of a Markdown report's
LONGEST_LABEL = 40  # characters in a chart
# What results.json has to hold, for the whole run and for each row.
RUN_FIELDS: dict[str, type] = {"model": str, "settings": dict, "seeds": list, "versions": dict, "rows": dict}
ROW_FIELDS: dict[str, type] = {"title": str, "lower_is_better": bool, "n": int, "mean": dict, "std": dict}


class ReportError(MiniCPMVError):
    """A report cannot be made of these folders: the message says why."""


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


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Compare runs in an .html file, an .md file with its images beside it, or a .csv file; returns the files written.

    Raises:
        ReportError: a folder holds no finished run, or the runs are not of one benchmark.
        DamagedFileError: a run's file cannot be read.
        UnwritableFileError: the report cannot be written there.
    """
    if output.suffix not in (".html", ".md", ".csv"):
        raise ReportError(f"{output}: a report is an .html, an .md or a .csv file")
    check_writable(output)
    runs = [read_run(folder) for folder in folders]
    benchmarks = {title_of(run) for run in runs}
    if len(benchmarks) > 1:
        raise ReportError(
            f"runs of {' and '.join(sorted(benchmarks))} cannot be compared: choose those of one version"
        )
    labels = labels_of(folders, runs)
    if output.suffix == ".csv":
        output.write_text(as_csv(labels, runs), encoding="utf-8", newline="")
        return [output]
    from minicpmv.evaluate import charts

    context: dict[str, Any] = {
        "title": benchmarks.pop(),
        "labels": labels,
        "runs": [{"label": label, **facts(run)} for label, run in zip(labels, runs, strict=True)],
        "rows": compare(runs),
        "notes": notes(runs),
        "published": beside_published(runs),
        "breakdowns": breakdowns(runs),
        "costs": costs(runs),
        "pairs": pairs(labels, folders),
        "mistakes": [
            {"label": label, "rows": mistakes(folder, run)}
            for label, folder, run in zip(labels, folders, runs, strict=True)
        ],
    }
    files = [output]
    with charts.plain_text():
        figures = draw(labels, runs)
        if output.suffix == ".html":
            context["charts"] = {name: svg_address(figure) for name, figure in figures.items()}
        else:
            context["charts"] = {name: f"{output.stem}-{name}.png" for name in figures}
            for name, figure in figures.items():
                files.append(output.with_name(f"{output.stem}-{name}.png"))
                figure.savefig(files[-1], dpi=120)
    files += place_pictures(context["mistakes"], output)
    output.write_text(render(output.suffix, context), encoding="utf-8")
    return files


def read_run(folder: Path) -> dict[str, Any]:
    """What the harness stored about a finished run.

    Raises:
        ReportError: the run was not finished.
        DamagedFileError: the file is not the harness's.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise ReportError(f"{folder} has no {RESULTS_FILE}: its run was not finished; run the same command again")
    run = read_json(path)
    checks: list[tuple[str, Any, Mapping[str, type]]] = [("the run", run, RUN_FIELDS)]
    if isinstance(run.get("rows"), dict):
        checks += [(f"row {name}", row, ROW_FIELDS) for name, row in run["rows"].items()]
    for what, found, fields in checks:
        for name, kind in fields.items():
            value = found.get(name) if isinstance(found, dict) else None
            if not isinstance(value, kind):
                raise DamagedFileError(
                    f"{path}: {name!r} of {what} is {value!r}, not of type {kind.__name__}; run the same command again"
                )
    return run


def facts(run: Mapping[str, Any]) -> dict[str, str]:
    """How a run was made, heading by heading."""
    settings = run["settings"]
    return {
        "model": run["model"],
        "weights": settings.get("weights") or settings.get("endpoint") or "-",
        "dtype": settings.get("dtype", "-"),
        "thinking": thinking_in_words(settings.get("thinking")),
        "samples a row": " or ".join(map(str, sample_counts(run))),
        "seeds": ", ".join(map(str, run["seeds"])),
        "software": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }


def sample_counts(run: Mapping[str, Any]) -> list[int]:
    """How many samples its rows have, each number once."""
    return sorted({row["n"] // max(1, len(run["seeds"])) for row in run["rows"].values()})


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


def sources(columns: Sequence[Any]) -> dict[str, list[str]]:
    """The models of each source, each once."""
    found: dict[str, list[str]] = {}
    for column in columns:
        models = found.setdefault(column.source, [])
        if column.model not in models:
            models.append(column.model)
    return found


COSTS = {
    "tokens": "tokens written",
    "prompt_tokens": "tokens read",
    "seconds": "seconds",
    "cut_off": "cut off",
    "undecided": "undecided",
    "judge": "judge",
}


def costs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What a question of each row took, and who decided, run by run; None where no run tells."""
    known = [name for name in COSTS if any(row.get(name) is not None for run in runs for row in run["rows"].values())]

    def text(run: Mapping[str, Any], row: str, name: str) -> str:
        value = run["rows"].get(row, {}).get(name)
        if value is None:
            return "-"
        if name == "judge" and (returned := run["rows"][row].get("judge_returned")):
            return ", ".join(dict.fromkeys([value, *returned]))
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


def pair_cells(row: Any) -> dict[str, str]:
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


CSV_COLUMNS = ("run", "model", "row", "metric", "unit", "value", "low", "high", "std", "n", *COSTS, "published")


def as_csv(labels: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> str:
    """A line for each run, row and metric; shares from 0 to 1."""
    text = io.StringIO()
    table = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    table.writeheader()
    published = COLUMNS[0].figures
    for label, run in zip(labels, runs, strict=True):
        for row, summary in run["rows"].items():
            for metric, value in summary["mean"].items():
                low, high = summary.get("interval", {}).get(metric) or (None, None)
                line = {"run": label, "model": run["model"], "row": row, "metric": metric, "value": value}
                line |= {"low": low, "high": high, "std": summary["std"].get(metric), "n": summary["n"]}
                line |= {"unit": "points" if metric in summary.get("points", ()) else "share"}
                line |= {name: summary.get(name) for name in COSTS}
                if row in published and metric == next(iter(summary["mean"])):
                    line["published"] = str(published[row])
                table.writerow({name: inert_cell(value) for name, value in line.items()})
    return text.getvalue()


def inert_cell(value: Any) -> Any:
    """A spreadsheet takes text that begins like a formula for one."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know before believing a difference."""
    asked = max(1, min((row["n"] for run in runs for row in run["rows"].values()), default=1))
    found = [
        f"Figures are percentages, unless they are said to be points. A share of right answers out of {asked} has a standard "
        f"error of up to {50 / math.sqrt(asked):.1f} points."
    ]
    if any(row.get("interval") for run in runs for row in run["rows"].values()):
        found.append("In small print: 95 % intervals, bootstrapped over questions.")
    if any(len(run["seeds"]) > 1 for run in runs):
        found.append("±: standard deviation over the seeds.")
    if len({(*sample_counts(run), "seeds", *run["seeds"]) for run in runs}) > 1:
        found.append("The runs were not asked about the same samples: see samples and seeds.")
    if any(summary["lower_is_better"] for run in runs for summary in run["rows"].values()):
        found.append("↓: the lower, the better.")
    return found


def mistakes(folder: Path, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first wrong answers of each row, those with an image first."""
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in run["rows"]}
    for entry in sorted(read_scored(folder), key=lambda entry: (entry["seed"], entry["index"])):
        if entry["row"] in found and main_score(entry["scores"]) == 0:
            found[entry["row"]].append(entry | {"picture": picture_of(folder, entry)})
    return [
        {"id": row, "entries": sorted(entries, key=lambda entry: entry["picture"] is None)[:MISTAKES]}
        for row, entries in found.items()
        if entries
    ]


def picture_of(folder: Path, entry: Mapping[str, Any]) -> Path | None:
    """The image that a run kept of a question, in its own folder or in that of one of its suites."""
    if not isinstance(entry.get("picture"), str):
        return None
    name = Path(entry["picture"]).name  # wherever a log points to, nothing outside is read
    places = [folder / PICTURES / name, *sorted(folder.glob(f"*/{PICTURES}/{glob.escape(name)}"))]
    return next((path for path in places if path.suffix == ".jpg" and path.is_file()), None)


def place_pictures(runs: Sequence[Mapping[str, Any]], output: Path) -> list[Path]:
    """Give the entries of the gallery an address for their image; returns the files that were copied for that."""
    copies = []
    for number, run in enumerate(runs):
        for entry in (entry for row in run["rows"] for entry in row["entries"]):
            path = entry["picture"]
            entry["address"] = None
            if path is not None and output.suffix == ".html":
                entry["address"] = "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
            elif path is not None:
                copy = output.with_name(f"{output.stem}-{PICTURES}") / f"{number}-{path.name}"
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
                copies.append(copy)
                entry["address"] = f"{copy.parent.name}/{copy.name}"
    return copies


def draw(labels: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> "dict[str, Figure]":
    """The figures by name; the radar only where three rows are high in a good model and known of every run."""
    from minicpmv.evaluate import charts

    labels = [label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…" for label in labels]
    mains = [(row, *main_metric(runs, row)) for row in row_ids(runs)]
    mains = [(row, metric, lower) for row, metric, lower in mains if not is_points(runs, row, metric)]
    bars = [
        (row[:LONGEST_LABEL] + " ↓" * lower, cells(runs, row, metric, "mean"), cells(runs, row, metric, "std"))
        for row, metric, lower in mains
    ]
    spokes = [(row, cells(runs, row, metric, "mean")) for row, metric, lower in mains if not lower]
    whole = [(row, [value for value in values if value is not None]) for row, values in spokes if None not in values]
    figures = {"bars": charts.bars(labels, bars)} if bars else {}
    if len(whole) >= 3:
        figures["radar"] = charts.radar(labels, whole)
    if points := points_of(labels, runs, [row for row, _ in whole]):
        figures["tokens"] = charts.accuracy_over_tokens(points)
    return figures


def points_of(
    labels: Sequence[str], runs: Sequence[Mapping[str, Any]], rows: Sequence[str]
) -> list[tuple[str, float, float]]:
    """Label, tokens a question and share of right answers of each run, over rows that all have; none for a single run."""
    if len(runs) < 2 or not rows:
        return []
    found = []
    for label, run in zip(labels, runs, strict=True):
        tokens = [run["rows"][row].get("tokens") for row in rows]
        if None in tokens:
            return []
        shares = [run["rows"][row]["mean"][main_metric(runs, row)[0]] for row in rows]
        found.append((label, fmean(tokens), fmean(shares)))
    return found


def svg_address(figure: "Figure") -> str:
    drawing = io.BytesIO()
    figure.savefig(drawing, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.getvalue()).decode()


def as_code(text: Any) -> str:
    """Text as a code span of Markdown inside a table: the one place in which nothing is markup."""
    text = re.sub(r"\s+", " ", str(text)).strip()
    if not text:
        return ""
    # A pipe ends a cell even here, and a backslash before it is read in two ways: so no text brings one of its own.
    text = text.replace("\\|", "\\ |").replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in (text[0], text[-1]) else f"{fence}{text}{fence}"


def render(suffix: str, context: dict[str, Any], name: str = "report") -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("minicpmv.evaluate", "."),
        autoescape=suffix == ".html",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = as_code
    return environment.get_template(f"{name}{suffix}.jinja").render(context)
