"""A page over many runs: a line for each model, a column for each benchmark, published models among them.

What is special:
- runs of one model in one setting, on different benchmarks, make one line;
- columns are those of the published table that a run has, in its order and units;
- published lines bear the marks of their sources, lines of one's own what makes them differ.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicpmv.evaluate.comparison import thinking_in_words
from minicpmv.evaluate.published import ALL_ROWS, COLUMNS, MARKS, PublishedRow, caveats
from minicpmv.evaluate.report import ReportError, inert_cell, read_run, render
from minicpmv.files import check_writable


SUFFIXES = (".html", ".md", ".csv")


@dataclass
class Line:
    """A model."""

    model: str
    mode: str
    source: str
    is_own: bool
    figures: dict[str, str]
    caveats: list[str] = field(default_factory=list)


def write_leaderboard(
    folders: Sequence[Path], output: Path, *, by: str | None = None, published: bool = True
) -> list[Path]:
    """Order models by a benchmark in an .html, .md or .csv file; returns the files written.

    Args:
        folders: of finished runs, of suites or groups.
        by: the row that orders them, best first; by default the first column.
        published: with the models whose figures are published.

    Raises:
        ReportError: a folder holds no finished run, no run has a row of the published table, or `by` is no column.
        DamagedFileError: a run's file cannot be read.
        UnwritableFileError: the page cannot be written there.
    """
    if output.suffix not in SUFFIXES:
        raise ReportError(f"{output}: a leaderboard is an .html, an .md or a .csv file")
    check_writable(output)
    lines = own_lines(folders)
    columns = [row for row in ALL_ROWS if any(row.id in line.figures for line in lines)]
    if not columns:
        raise ReportError(
            "none of these runs has a row of the published table: run `minicpmv evaluate opencompass`, say"
        )
    order = next((row for row in columns if row.id == (by or columns[0].id)), None)
    if order is None:
        raise ReportError(f"--by {by}: no run has this row; they have {', '.join(row.id for row in columns)}")
    if published:
        lines += published_lines(columns)
    lines.sort(key=lambda line: rank(line, order))
    if output.suffix == ".csv":
        output.write_text(as_csv(lines, columns), encoding="utf-8", newline="")
        return [output]
    notes = [
        *(f"{line.model}: {sentence}" for line in lines for sentence in line.caveats),
        *(f"{mark} {meaning}." for mark, meaning in MARKS.items() if published),
    ]
    context = {"columns": columns, "lines": lines, "notes": notes, "by": order.title}
    output.write_text(render(output.suffix, context, name="leaderboard"), encoding="utf-8")
    return [output]


def own_lines(folders: Sequence[Path]) -> list[Line]:
    """One line for the runs of a model in a setting; of a row that two runs have, the first counts."""
    lines: dict[tuple[str, ...], Line] = {}
    for folder in folders:
        run = read_run(folder)
        settings: dict[str, Any] = run["settings"]
        mode = f"thinking {thinking_in_words(settings.get('thinking'))}"
        mode += ", as published" if settings.get("as_published") else ""
        key = (run["model"], str(settings.get("weights") or settings.get("endpoint")), mode)
        line = lines.setdefault(key, Line(Path(run["model"]).name or run["model"], mode, "your run", True, {}))
        for row in ALL_ROWS:
            if row.id not in line.figures and (figure := row.own(run)) is not None:
                line.figures[row.id] = figure
        line.caveats += [sentence for sentence in caveats(run) if sentence not in line.caveats]
        if line.caveats:
            line.source = "your run, see below"
    return list(lines.values())


def published_lines(columns: Sequence[PublishedRow]) -> list[Line]:
    """Published models that have a figure in one of the columns."""
    ids = {row.id for row in columns}
    return [
        Line(
            column.model, column.mode, column.source, False, {name: str(each) for name, each in column.figures.items()}
        )
        for column in COLUMNS
        if ids & column.figures.keys()
    ]


def rank(line: Line, row: PublishedRow) -> tuple[bool, float]:
    """Sorts the best first, and those without a figure last."""
    figure = line.figures.get(row.id)
    if figure is None:
        return True, 0.0
    value = float(figure.rstrip("".join(MARKS)))
    return False, value if row.lower_is_better else -value


def as_csv(lines: Sequence[Line], columns: Sequence[PublishedRow]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["model", "mode", "source", *(row.id for row in columns)])
    for line in lines:
        cells = [line.model, line.mode, line.source, *(line.figures.get(row.id, "") for row in columns)]
        table.writerow(map(inert_cell, cells))
    return text.getvalue()
