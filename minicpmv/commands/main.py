"""The `minicpmv` command. Each subcommand is one module of the package, imported when it is asked for."""

from pathlib import Path
from typing import Annotated

import typer

from minicpmv.commands.ask import ask
from minicpmv.commands.chat import chat
from minicpmv.commands.evaluate import evaluate_app
from minicpmv.commands.read import read
from minicpmv.commands.serve import serve
from minicpmv.commands.train import align_app, train_app
from minicpmv.commands.video import video
from minicpmv.commands.web import web
from minicpmv.errors import one_line_errors


app = typer.Typer(
    name="minicpmv",
    help="MiniCPM-V 4.5: what to do with the model.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(train_app, name="train")
app.add_typer(align_app, name="align")
app.add_typer(evaluate_app, name="evaluate")
app.command()(chat)
app.command()(ask)
app.command()(read)
app.command()(video)
app.command()(web)
app.command()(serve)


@app.callback()
def main():
    """MiniCPM-V 4.5: what to do with the model."""


@app.command()
def fetch(
    folder: Annotated[
        Path, typer.Argument(help="A clone of this repository: the weights go beside config.json.")
    ] = Path("."),
    repo: Annotated[str, typer.Option(help="Hub repository that holds the weights.")] = "openbmb/MiniCPM-V-4_5",
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the Hub repository.")] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Download nothing; check what is there.")] = False,
):
    """Attach the published weights (17.4 GB): download, check every tensor's name and shape, move into place.

    Run it again after an interruption: it goes on where it stopped.

    Examples:

      minicpmv fetch

      minicpmv fetch ~/MiniCPM-V-4_5 --check-only
    """
    from minicpmv import fetch as weights

    with one_line_errors(weights.FetchError):
        parameters = weights.check_checkpoint(folder) if check_only else weights.fetch(folder, repo, revision)
    typer.echo(f"{folder}: all tensors have the published names and shapes, {parameters / 1e9:.2f} billion parameters")


@app.command()
def build_tokenizer(
    folder: Annotated[Path, typer.Argument(help="A clone of this repository, with tokenizer_config.json.")] = Path(
        "."
    ),
    from_hub: Annotated[bool, typer.Option("--from-hub", help="Take the vocabulary that the Hub publishes.")] = False,
    revision: Annotated[str | None, typer.Option(help="Commit or tag on the Hub.")] = None,
):
    """Write tokenizer.json from the vocabulary in the PyPI package dashscope."""
    from minicpmv import build_tokenizer as tokenizer

    with one_line_errors(tokenizer.VocabularyError):
        path, written = tokenizer.build(folder, tokenizer.HUB_REPOSITORY if from_hub else None, revision)
    typer.echo(f"{path}: {'written' if written else 'up to date'}")


@app.command()
def demo(
    model: Annotated[Path | None, typer.Option(help="A model folder; nano by default.")] = None,
):
    """Ask a model about the pictures and the clip that come with the repository."""
    from minicpmv.commands import demo as show

    with one_line_errors(show.DemoError):
        show.run(model)


if __name__ == "__main__":
    app()
