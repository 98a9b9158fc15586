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
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.benchmark import main_score
from minicpmv.evaluate.comparison import (
    COSTS,
    beside_published,
    breakdowns,
    cells,
    compare,
    costs,
    facts,
    frames_in_words,
    is_points,
    labels_of,
    main_metric,
    notes,
    pairs,
    row_ids,
    title_of,
)
from minicpmv.evaluate.harness import RESULTS_FILE
from minicpmv.evaluate.published import COLUMNS
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
                line["video"] = frames_in_words(summary["video"]) if summary.get("video") else None
                if row in published and metric == next(iter(summary["mean"])):
                    line["published"] = str(published[row])
                table.writerow({name: inert_cell(value) for name, value in line.items()})
    return text.getvalue()


def inert_cell(value: Any) -> Any:
    """A spreadsheet takes text that begins like a formula for one."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


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
