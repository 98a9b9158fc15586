"""Tables and charts of runs: one run in the terminal, several side by side in HTML or Markdown.

What is special:
- an HTML report is one file: the charts stand in it as SVG;
- runs are compared as they are; where they were asked about other samples, the report says so;
- the first mistakes of each run are listed: a figure is understood by the answers behind it.
"""

import base64
import io
import json
import math
from pathlib import Path

from minicpmv.evaluate.harness import RESULTS_FILE
from minicpmv.evaluate.sample_log import SAMPLES_FILE, read_entries


MISTAKES = 3  # shown for each row and run


class ReportError(ValueError):
    """A report cannot be made of these folders: the message says why."""


def percent(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def title_of(run: dict) -> str:
    return f"{run['settings']['benchmark']}, version {run['settings']['version']}"


def as_table(results: dict):
    """A rich table of one run: a line for each metric of each row."""
    from rich.markup import escape
    from rich.table import Table

    several = len(results["seeds"]) > 1
    table = Table(
        title=f"{title_of(results)}: {escape(results['checkpoint'])}",
        caption=f"{results['samples']} samples a row, seed{'s' * several} {', '.join(map(str, results['seeds']))}"
        + "; mean ± standard deviation over seeds" * several,
    )
    for heading, justify in (("row", "left"), ("metric", "left"), ("%", "right"), ("n", "right")):
        table.add_column(heading, justify=justify)
    for row, summary in results["rows"].items():
        name, count = row + " ↓" * summary["lower_is_better"], str(summary["n"])
        for metric, value in summary["mean"].items():
            table.add_row(name, metric, percent(value, summary["std"][metric]), count)
            name = count = ""
    return table


def write_report(folders: list[Path], output: Path) -> list[Path]:
    """Compare runs in an .html file, or an .md file with the charts as .png beside it; the files written.

    Raises:
        ReportError: a folder holds no finished run, or the runs are not of one benchmark.
    """
    if output.suffix not in (".html", ".md"):
        raise ReportError(f"{output}: a report is an .html or an .md file")
    runs = [read_run(folder) for folder in folders]
    benchmarks = {title_of(run) for run in runs}
    if len(benchmarks) > 1:
        raise ReportError(
            f"runs of {' and '.join(sorted(benchmarks))} cannot be compared: choose those of one version"
        )
    labels = labels_of(folders, runs)
    context = {
        "title": benchmarks.pop(),
        "labels": labels,
        "runs": [{"label": label, **run} for label, run in zip(labels, runs, strict=True)],
        "rows": compare(runs),
        "notes": notes(runs),
        "thinking": thinking_in_words,
        "mistakes": [
            {"label": label, "rows": mistakes(folder, run)}
            for label, folder, run in zip(labels, folders, runs, strict=True)
        ],
    }
    figures = draw(labels, runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    files = [output]
    if output.suffix == ".html":
        context["charts"] = {name: svg_address(figure) for name, figure in figures.items()}
    else:
        context["charts"] = {name: f"{output.stem}-{name}.png" for name in figures}
        for name, figure in figures.items():
            files.append(output.with_name(f"{output.stem}-{name}.png"))
            figure.savefig(files[-1], dpi=120)
    output.write_text(render(output.suffix, context), encoding="utf-8")
    return files


def read_run(folder: Path) -> dict:
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise ReportError(f"{folder} has no {RESULTS_FILE}: its run was not finished; run the same command again")
    return json.loads(path.read_text(encoding="utf-8"))


def thinking_in_words(thinking: bool | str | list[str]) -> str:
    return ", ".join(thinking) if isinstance(thinking, list) else {True: "on", False: "off"}.get(thinking, thinking)


def labels_of(folders: list[Path], runs: list[dict]) -> list[str]:
    """The first of these that tells the runs apart: names of checkpoints, names of folders, whole paths."""
    checkpoints = [Path(run["checkpoint"]).name or run["checkpoint"] for run in runs]
    for names in (checkpoints, [folder.resolve().name for folder in folders]):
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def row_ids(runs: list[dict]) -> list[str]:
    """All rows of all runs, in the order of the first run that has them."""
    return list(dict.fromkeys(row for run in runs for row in run["rows"]))


def cells(runs: list[dict], row: str, metric: str, part: str) -> list[float | None]:
    """One value a run, None where a run lacks it; `part` is "mean" or "std"."""
    return [run["rows"].get(row, {}).get(part, {}).get(metric) for run in runs]


def main_metric(runs: list[dict], row: str) -> tuple[str, bool]:
    """The first metric of a row, and whether low values are the better ones."""
    summary = next(run["rows"][row] for run in runs if row in run["rows"])
    return next(iter(summary["mean"])), summary["lower_is_better"]


def compare(runs: list[dict]) -> list[dict]:
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


def notes(runs: list[dict]) -> list[str]:
    """What a reader has to know before believing a difference."""
    asked = min(run["samples"] * len(run["seeds"]) for run in runs)
    found = [
        f"All figures are percentages. A share of right answers out of {asked} has a standard error of up to "
        f"{50 / math.sqrt(asked):.1f} points."
    ]
    if any(len(run["seeds"]) > 1 for run in runs):
        found.append("±: standard deviation over the seeds.")
    if len({(run["samples"], tuple(run["seeds"])) for run in runs}) > 1:
        found.append("The runs were not asked about the same samples: see samples and seeds.")
    if any(summary["lower_is_better"] for run in runs for summary in run["rows"].values()):
        found.append("↓: the lower, the better.")
    return found


def mistakes(folder: Path, run: dict) -> list[dict]:
    """The first wrong answers of each row that has an exact expected answer."""
    found: dict[str, list[dict]] = {row: [] for row in run["rows"]}
    for entry in sorted(read_entries(folder / SAMPLES_FILE), key=lambda entry: (entry["seed"], entry["index"])):
        if entry["row"] in found and entry["scores"].get("exact") == 0 and len(found[entry["row"]]) < MISTAKES:
            found[entry["row"]].append(entry)
    return [{"id": row, "entries": entries} for row, entries in found.items() if entries]


def draw(labels: list[str], runs: list[dict]) -> dict:
    """The figures by name; the radar only where three rows are high in a good model and known of every run."""
    from minicpmv.evaluate import charts

    mains = [(row, *main_metric(runs, row)) for row in row_ids(runs)]
    bars = [
        (row + " ↓" * lower, cells(runs, row, metric, "mean"), cells(runs, row, metric, "std"))
        for row, metric, lower in mains
    ]
    spokes = [(row, cells(runs, row, metric, "mean")) for row, metric, lower in mains if not lower]
    spokes = [(row, values) for row, values in spokes if None not in values]
    figures = {"bars": charts.bars(labels, bars)}
    if len(spokes) >= 3:
        figures["radar"] = charts.radar(labels, spokes)
    return figures


def svg_address(figure) -> str:
    drawing = io.BytesIO()
    figure.savefig(drawing, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.getvalue()).decode()


def render(suffix: str, context: dict) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("minicpmv.evaluate", "."),
        autoescape=suffix == ".html",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = "report.html.jinja" if suffix == ".html" else "report.md.jinja"
    return environment.get_template(template).render(context)
