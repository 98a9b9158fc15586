"""What every command does with an expected error: one line on stderr, and exit code 1."""

import importlib.util
import sys
from contextlib import contextmanager


class MissingPackageError(RuntimeError):
    """A package of an extra is not installed: the message says which, and how to get it."""

    def __init__(self, extra: str, *packages: str):
        verb = "is" if len(packages) == 1 else "are"
        super().__init__(f"{', '.join(packages)} {verb} not installed: pip install '.[{extra}]' in a clone")


def require(extra: str, *packages: str) -> None:
    """Raises:
    MissingPackageError: before anything is loaded, for all that lack.
    """
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise MissingPackageError(extra, *missing)


@contextmanager
def one_line_errors(*expected):
    """An error of an `expected` type ends the command with exit code 1 and its message, which names the remedy."""
    try:
        yield
    except expected as error:
        print(f"minicpmv: {error}", file=sys.stderr)
        # Not typer's own Exit: modules run without typer as well (accelerate launch -m).
        raise SystemExit(1) from error
