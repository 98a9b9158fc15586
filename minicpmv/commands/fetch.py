"""`minicpmv fetch`: the published weights, into a clone."""

from pathlib import Path
from typing import Annotated

import typer

from minicpmv.checkpoint import PUBLISHED
from minicpmv.commands import terminal
from minicpmv.errors import one_line_errors


def fetch(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A clone of this repository: the weights go beside config.json.")
    ] = Path("."),
    repo: Annotated[str, typer.Option(metavar="NAME", help="Hub repository that holds the weights.")] = PUBLISHED,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Commit, tag or branch of the Hub repository.")
    ] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Download nothing; check what is there.")] = False,
) -> None:
    """Attach the published weights (17.4 GB): download, check, move into place.

    Run it again after an interruption: it goes on where it stopped.

    Examples:

    \b
      minicpmv fetch
      minicpmv fetch ~/MiniCPM-V-4_5 --check-only
    """
    with one_line_errors(OSError):
        from minicpmv import fetch as weights

        found = weights.check_checkpoint(folder) if check_only else weights.fetch(folder, repo, revision)
        source = found.source
        terminal.write(
            f"{folder}: all tensors have the published names and shapes, {found.parameters / 1e9:.2f} billion parameters; "
            + (
                f"the bytes are those of {source.repository} at {source.commit}"
                if source
                else "their bytes were not checked, since minicpmv fetch did not bring them"
            )
        )
