"""`minicpmv build-tokenizer`: tokenizer.json, which is too large for git."""

from pathlib import Path
from typing import Annotated

import typer

from minicpmv.commands import terminal
from minicpmv.errors import one_line_errors


def build_tokenizer(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A clone of this repository, with tokenizer_config.json.")
    ] = Path("."),
    from_hub: Annotated[bool, typer.Option("--from-hub", help="Take the vocabulary that the Hub publishes.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Commit, tag or branch of the Hub repository.")
    ] = None,
) -> None:
    """Write tokenizer.json from the vocabulary in the PyPI package dashscope."""
    with one_line_errors(OSError):
        from minicpmv import build_tokenizer as tokenizer

        path, written = tokenizer.build(folder, from_hub, revision)
        terminal.write(f"{path}: {'written' if written else 'up to date'}")
