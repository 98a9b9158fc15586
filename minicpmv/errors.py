"""Errors that a caller can mend, and what a command does with them: one line on stderr, and exit code 1.

The model's own files cannot import this package, and transformers may load them more than once. Their errors are told by
the attribute `is_minicpmv`, which they share with the ones here.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


# A message may quote a file's name or a model's words: neither may steer the terminal.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160))}


class MiniCPMVError(ValueError):
    """Something that the caller can mend: the message names the value, the limit and the remedy."""

    is_minicpmv = True


class MissingPackageError(MiniCPMVError):
    """A package of an extra is not installed: the message says which, and how to get it."""

    def __init__(self, extra: str, *packages: str):
        verb = "is" if len(packages) == 1 else "are"
        super().__init__(f"{', '.join(packages)} {verb} not installed: pip install -e '.[{extra}]' in a clone")


def require(extra: str, *packages: str) -> None:
    """Refuse to start without the packages of an extra, before anything is loaded.

    Raises:
        MissingPackageError: names all that lack.
    """
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise MissingPackageError(extra, *missing)


def is_expected(error: BaseException) -> bool:
    """Whether an error is one of this package's or of the model's own: anything else is a bug, and shows its traceback."""
    return getattr(error, "is_minicpmv", False)


def one_line(error: BaseException | str) -> str:
    """A message for the terminal: in one line, without control characters."""
    return " ".join(str(error).split()).translate(CONTROLS)


@contextmanager
def one_line_errors(*also: type[Exception]) -> Iterator[None]:
    """End the command with exit code 1 and the message of an expected error, or of one of the types in `also`."""
    caught: tuple[type[Exception], ...] = (ValueError, *also)
    try:
        yield
    except caught as error:
        if not (is_expected(error) or isinstance(error, also)):
            raise
        print(f"minicpmv: {one_line(error)}", file=sys.stderr)
        # Not typer's own Exit: modules run without typer as well (accelerate launch -m).
        raise SystemExit(1) from error
