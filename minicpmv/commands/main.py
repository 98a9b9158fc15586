"""The `minicpmv` command: one line a verb. A verb's module imports what is heavy only when it runs."""

from typing import Annotated

import typer

from minicpmv.commands.ask import ask
from minicpmv.commands.batch import batch
from minicpmv.commands.build_tokenizer import build_tokenizer
from minicpmv.commands.chat import chat
from minicpmv.commands.compress import compress
from minicpmv.commands.demo import demo
from minicpmv.commands.evaluate import evaluate_app
from minicpmv.commands.export import export_app
from minicpmv.commands.fetch import fetch
from minicpmv.commands.quantize import quantize
from minicpmv.commands.read import read
from minicpmv.commands.serve import serve
from minicpmv.commands.show import show
from minicpmv.commands.train import align_app, train_app
from minicpmv.commands.video import video
from minicpmv.commands.web import web


# Plain help: rich's cuts names where the terminal is narrow, and calls flags <bool>.
app = typer.Typer(name="minicpmv", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
for verb in (ask, chat, read, video, batch, web, serve, show, fetch, compress, quantize, demo, build_tokenizer):
    app.command()(verb)
for name, group in {"train": train_app, "align": align_app, "evaluate": evaluate_app, "export": export_app}.items():
    app.add_typer(group, name=name)


def show_version(wanted: bool) -> None:
    if wanted:
        from minicpmv import __version__

        typer.echo(f"minicpmv {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """MiniCPM-V 4.5: what to do with the model."""


if __name__ == "__main__":
    app()
