"""`minicpmv evaluate check-scorers`: our scorers against cases that others decided."""

from pathlib import Path
from typing import Annotated

import typer

from minicpmv.commands import evaluate_options as shared
from minicpmv.commands import terminal
from minicpmv.errors import one_line, one_line_errors, require


def check_scorers(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON with cases: scorer, prediction, reference, expected.")
    ],
    scoring: shared.Rules = shared.Scoring.current,
) -> None:
    """Hold the scorers of public benchmarks against cases that others decided.

    Names each case that falls short, and ends with exit code 1 if one does.
    """
    with one_line_errors(OSError, UnicodeDecodeError):
        require("evaluate", "apted", "bs4", "jieba", "lxml", "nltk", "pylatexenc", "rapidfuzz", "scipy")
        from minicpmv.evaluate.scoring.cases import read_cases, shortfalls

        cases = read_cases(file)
        lines = list(shortfalls(cases, scoring.value))
        for line in lines:
            terminal.write(one_line(line))
        terminal.write(f"{len(cases) - len(lines)} of {len(cases)} cases agree with {file}")
        if lines:
            raise SystemExit(1)
