"""Runs side by side in HTML or Markdown, with tables, charts and the first mistakes of each.

What is special:
- an HTML report is one file: the charts stand in it as SVG;
- runs are compared as they are; where they were asked about other samples, the report says so;
- what models wrote, and what files of runs hold, is shown as text: no link, image or tag in it comes alive.
"""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.harness import RESULTS_FILE
from minicpmv.evaluate.sample_log import read_scored
from minicpmv.files import DamagedFileError, check_writable, read_json


if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISTAKES = 3  # shown for each row and run
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


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Compare runs in an .html file, or an .md file with its charts as .png files; returns the files written.

    Raises:
        ReportError: a folder holds no finished run, or the runs are not of one benchmark.
        DamagedFileError: a run's file cannot be read.
        UnwritableFileError: the report cannot be written there.
    """
    if output.suffix not in (".html", ".md"):
        raise ReportError(f"{output}: a report is an .html or an .md file")
    check_writable(output)
    runs = [read_run(folder) for folder in folders]
    benchmarks = {title_of(run) for run in runs}
    if len(benchmarks) > 1:
        raise ReportError(
            f"runs of {' and '.join(sorted(benchmarks))} cannot be compared: choose those of one version"
        )
    from minicpmv.evaluate import charts

    labels = labels_of(folders, runs)
    context: dict[str, Any] = {
        "title": benchmarks.pop(),
        "labels": labels,
        "runs": [{"label": label, **facts(run)} for label, run in zip(labels, runs, strict=True)],
        "rows": compare(runs),
        "notes": notes(runs),
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


def compare(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the comparison: id, title, metric, texts of the cells and which of them are the best."""
    lines = []
    for row in row_ids(runs):
        summary = next(run["rows"][row] for run in runs if row in run["rows"])
        main, lower_is_better = main_metric(runs, row)
        for metric in summary["mean"]:
            values, spreads = cells(runs, row, metric, "mean"), cells(runs, row, metric, "std")
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
                        {"text": percent(value, spread), "best": best is not None and value == best}
                        for value, spread in zip(values, spreads, strict=True)
                    ],
                }
            )
    return lines


def notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know before believing a difference."""
    asked = max(1, min((row["n"] for run in runs for row in run["rows"].values()), default=1))
    found = [
        f"All figures are percentages. A share of right answers out of {asked} has a standard error of up to "
        f"{50 / math.sqrt(asked):.1f} points."
    ]
    if any(len(run["seeds"]) > 1 for run in runs):
        found.append("±: standard deviation over the seeds.")
    if len({(*sample_counts(run), "seeds", *run["seeds"]) for run in runs}) > 1:
        found.append("The runs were not asked about the same samples: see samples and seeds.")
    if any(summary["lower_is_better"] for run in runs for summary in run["rows"].values()):
        found.append("↓: the lower, the better.")
    return found


def mistakes(folder: Path, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first wrong answers of each row that has an exact expected answer."""
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in run["rows"]}
    for entry in sorted(read_scored(folder), key=lambda entry: (entry["seed"], entry["index"])):
        if entry["row"] in found and entry["scores"].get("exact") == 0 and len(found[entry["row"]]) < MISTAKES:
            found[entry["row"]].append(entry)
    return [{"id": row, "entries": entries} for row, entries in found.items() if entries]


def draw(labels: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> "dict[str, Figure]":
    """The figures by name; the radar only where three rows are high in a good model and known of every run."""
    from minicpmv.evaluate import charts

    labels = [label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…" for label in labels]
    mains = [(row, *main_metric(runs, row)) for row in row_ids(runs)]
    bars = [
        (row[:LONGEST_LABEL] + " ↓" * lower, cells(runs, row, metric, "mean"), cells(runs, row, metric, "std"))
        for row, metric, lower in mains
    ]
    spokes = [(row, cells(runs, row, metric, "mean")) for row, metric, lower in mains if not lower]
    whole = [(row, [value for value in values if value is not None]) for row, values in spokes if None not in values]
    figures = {"bars": charts.bars(labels, bars)}
    if len(whole) >= 3:
        figures["radar"] = charts.radar(labels, whole)
    return figures


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


def render(suffix: str, context: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("minicpmv.evaluate", "."),
        autoescape=suffix == ".html",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = as_code
    template = "report.html.jinja" if suffix == ".html" else "report.md.jinja"
    return environment.get_template(template).render(context)
