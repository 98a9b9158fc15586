"""The folder that an export leaves: files appear in it when all of them are whole and held against PyTorch, with a card
beside them."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from minicpmv.checkpoint import WEIGHTS
from minicpmv.deploy.parity import Parity, ParityError
from minicpmv.errors import MiniCPMVError
from minicpmv.files import write_whole


RECORD = ".parity.json"  # what was found about an export, beside it
CARD = "README.md"


class OutputError(MiniCPMVError):
    """An export cannot go where it should go."""


def check_output(output: Path, size: int) -> None:
    """Refuse a folder that holds a checkpoint, whose card would be lost, or a disk that is too full.

    Raises:
        OutputError: names it.
    """
    if output.is_file() or any(any(output.glob(pattern)) for pattern in WEIGHTS):
        raise OutputError(f"{output} is a file or holds a checkpoint: name another folder")
    there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    if (free := shutil.disk_usage(there).free) < size:
        raise OutputError(f"{output} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there: make room")


@contextmanager
def _gone_if_interrupted(stage: Path) -> Iterator[None]:
    try:
        yield
    except ParityError:
        raise
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


@contextmanager
def staged(output: Path, name: str) -> Iterator[Path]:
    """A folder to write into, whose files move to `output` at the end.

    What was interrupted leaves nothing. What differs too much from PyTorch stays in it, to be looked at.

    Raises:
        OutputError: it cannot be made.
    """
    stage = output / f"unfinished-{name}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error.strerror}): name another folder") from error
    with _gone_if_interrupted(stage):
        yield stage
    for file in sorted(stage.iterdir(), key=lambda file: file.name.startswith(name)):  # what counts comes last
        if (there := output / file.name).is_dir():
            shutil.rmtree(there)
        os.replace(file, there)
    stage.rmdir()


def check_new(output: Path, size: int) -> None:
    """Refuse a place where something is, or a disk that is too full.

    Raises:
        OutputError: names it.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(f"{output} is there already: name a new folder")
    check_output(output, size)


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, beside `output`, which becomes it at the end, all at once.

    What was interrupted leaves nothing. What differs too much from PyTorch stays under its first name, to be looked at.

    Raises:
        OutputError: it cannot be made.
    """
    output = output.absolute()
    stage = output.with_name(f"unfinished-{output.name}")
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{stage} cannot be made ({error.strerror}): name another folder") from error
    with _gone_if_interrupted(stage):
        yield stage
    if output.is_dir():
        output.rmdir()  # it is empty
    stage.rename(output)


def write_record(folder: Path, parity: Parity) -> None:
    """Keep what was found as `NAME.parity.json`."""
    write_whole(folder / f"{parity.name}{RECORD}", json.dumps(asdict(parity), indent=1) + "\n")


def write_card(
    folder: Path, library: str, title: str, base: str, use: str, names: Iterable[str], is_space: bool = False
) -> None:
    """Write the card of a folder from the records in it.

    Args:
        library: what the Hub calls the software.
        base: Markdown: what was exported.
        use: Markdown: how to use it.
        names: of all exports in the folder, whether they have a record or not.
        is_space: the folder is a page, which the Hub may serve as a Space.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("minicpmv.deploy", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"largest": _largest, "percent": lambda share: f"{100 * share:.0f}"}
    names = sorted(names)
    files = [folder / f"{name}{RECORD}" for name in names]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    unchecked = [f"`{name}`" for name, file in zip(names, files, strict=True) if not file.is_file()]
    template = environment.get_template("card.md.jinja")
    card = template.render(
        library=library, title=title, base=base, use=use, exports=found, unchecked=unchecked, is_space=is_space
    )
    write_whole(folder / CARD, card.rstrip() + "\n")


def _largest(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.2g}" if known else "not shown"
