"""What every command does with an expected error: one line on stderr, and exit code 1."""

import sys
from contextlib import contextmanager


@contextmanager
def one_line_errors(*expected):
    """An error of an `expected` type ends the command with exit code 1 and its message, which names the remedy."""
    try:
        yield
    except expected as error:
        print(f"minicpmv: {error}", file=sys.stderr)
        raise SystemExit(
            1
        ) from error  # not typer's own Exit: modules run without typer as well (accelerate launch -m)
