"""`minicpmv evaluate report`, `diff` and `leaderboard`: what runs say beside each other."""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpmv.commands import terminal
from minicpmv.errors import one_line, one_line_errors, require


if TYPE_CHECKING:
    from minicpmv.evaluate.pairing import RowPair

Folders = Annotated[list[Path], typer.Argument(help="Folders of runs, such as runs/nanobench-*.")]


def report(
    folders: Folders,
    output: Annotated[
        Path,
        typer.Option(
            help="An .html file that contains everything, an .md file with its images beside it, or a .csv file."
        ),
    ] = Path("report.html"),
) -> None:
    """Compare runs side by side, and with published figures: models, checkpoints or settings."""
    with one_line_errors(OSError):
        require("evaluate", "matplotlib")
        from minicpmv.evaluate.report import write_report

        for file in write_report(folders, output):
            terminal.write(str(file))


def leaderboard(
    folders: Folders,
    output: Annotated[Path, typer.Option(help="An .html, .md or .csv file.")] = Path("leaderboard.html"),
    by: Annotated[
        str | None, typer.Option(metavar="ROW", help="Row that orders the models; by default the first there is.")
    ] = None,
    own_only: Annotated[bool, typer.Option("--own-only", help="Without the published models.")] = False,
) -> None:
    """Order models by a benchmark: your runs, and those whose figures are published."""
    with one_line_errors(OSError):
        from minicpmv.evaluate.leaderboard import write_leaderboard

        for file in write_leaderboard(folders, output, by=by, published=not own_only):
            terminal.write(str(file))


def diff(
    first: Annotated[Path, typer.Argument(help="Folder of a run, such as that of the full model.")],
    second: Annotated[Path, typer.Argument(help="Folder of another, such as that of the quantized one.")],
    show: Annotated[int, typer.Option(metavar="N", min=0, help="Questions that flipped to show, of each row.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all figures and flips to this file.")
    ] = None,
) -> None:
    """Compare two runs question by question: which flipped, by how much, and whether chance would do that.

    p is McNemar's exact test over the questions that just one run has right.
    """
    with one_line_errors(OSError):
        from minicpmv.evaluate.pairing import pair_runs
        from minicpmv.evaluate.report import read_run
        from minicpmv.files import check_writable

        if json_file is not None:
            check_writable(json_file)
        runs = read_run(first), read_run(second)
        rows = pair_runs(first, second)
        terminal.write(table_of(rows))
        for line in differences(runs[0]["settings"], runs[1]["settings"]):
            terminal.write(one_line(line))
        for row in rows:
            for flip in row.flips[:show]:
                terminal.write(one_line(in_words(row, flip)))
            if len(row.flips) > show:
                terminal.write(f"{row.row}: {len(row.flips) - show} more (--show, or --json for all)")
        if json_file is not None:
            json_file.write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def table_of(rows: Sequence["RowPair"]) -> str:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from minicpmv.evaluate.comparison import pair_cells

    table = Table(
        title="second minus first", caption="lost, gained: right in one run only; p: McNemar's exact test of these"
    )
    lines = [pair_cells(row) for row in rows]
    for name in lines[0]:
        table.add_column(name, justify="left" if name == "row" else "right", no_wrap=name != "row")
    for line in lines:
        table.add_row(*map(escape, line.values()))
    text = io.StringIO()
    Console(file=text, force_terminal=sys.stdout.isatty()).print(table)
    return text.getvalue().rstrip("\n")


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Which settings of two runs differ."""
    return [
        f"{name}: {first.get(name)!r}, then {second.get(name)!r}"
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    ]


def in_words(row: "RowPair", flip: Any) -> str:
    change = "now right" if flip.gained else "now wrong"
    return (
        f"{row.row} {flip.first['seed']}/{flip.first['index']} {change}: {flip.first.get('question')!r:.200} "
        f"{flip.first['answer']!r:.80} -> {flip.second['answer']!r:.80}, expected {flip.first.get('expected')!r:.120}"
    )


def as_json(row: "RowPair") -> dict[str, Any]:
    pairing = row.pairing
    return {
        "row": row.row,
        "questions": pairing.questions,
        "not_shared": row.alone,
        "first": pairing.first,
        "second": pairing.second,
        "difference": pairing.difference,
        "interval": [pairing.interval.low, pairing.interval.high],
        "only_first": len(pairing.only_first),
        "only_second": len(pairing.only_second),
        "p": pairing.p,
        "flips": [
            {
                "seed": flip.first["seed"],
                "index": flip.first["index"],
                "gained": flip.gained,
                "first": flip.first["answer"],
                "second": flip.second["answer"],
            }
            for flip in row.flips
        ],
    }
