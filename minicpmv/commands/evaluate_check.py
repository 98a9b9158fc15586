"""`minicpmv evaluate check-scorers`: our scorers against cases that others decided."""

from pathlib import Path
from typing import Annotated

import typer

from minicpmv.commands import terminal
from minicpmv.errors import one_line, one_line_errors, require
from minicpmv.evaluate.scoring import SCORINGS


def known_version(value: str) -> str:
    if value not in SCORINGS:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(SCORINGS)}")
    return value


Scoring = Annotated[
    str,
    typer.Option(
        metavar="VERSION",
        callback=known_version,
        help=f"Rules of which time, where they changed: {', '.join(SCORINGS)}.",
    ),
]


def check_scorers(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON with cases: scorer, prediction, reference, expected.")
    ],
    scoring: Scoring = "current",
) -> None:
    """Hold the scorers of public benchmarks against cases that others decided.

    Names each case that falls short, and ends with exit code 1 if one does.
    """
    with one_line_errors(OSError, UnicodeDecodeError):
        require("evaluate", "rapidfuzz")
        from minicpmv.evaluate.scoring.cases import read_cases, shortfalls

        cases = read_cases(file)
        lines = list(shortfalls(cases, scoring))  # type: ignore[arg-type]  # the option knows no others
        for line in lines:
            terminal.write(one_line(line))
        terminal.write(f"{len(cases) - len(lines)} of {len(cases)} cases agree with {file}")
        if lines:
            raise SystemExit(1)
