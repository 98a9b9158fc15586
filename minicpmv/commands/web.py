"""`minicpmv web`: a page in the browser to talk with a model about pictures and clips."""

from typing import Annotated

import typer

from minicpmv.commands import terminal
from minicpmv.errors import MiniCPMVError, one_line_errors


class WebError(MiniCPMVError):
    """The page cannot be served: the message says why and what to do."""


def web(
    model: terminal.Model = ".",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="A free one from 7860 on by default.")] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public address, through a tunnel that Gradio runs.")
    ] = False,
    max_conversations: Annotated[
        int, typer.Option(min=1, help="Most conversations kept; the one unused for longest is forgotten.")
    ] = 16,
    revision: terminal.Revision = None,
    trust_remote_code: terminal.TrustRemoteCode = False,
):
    """Open a page to talk with a model: pictures, clips, camera, thinking, and what the model sees.

    Examples:

      minicpmv web

      minicpmv web -m nano --port 8080

      minicpmv web --host 0.0.0.0
    """
    from rich.console import Console

    with one_line_errors(ValueError, OSError, WebError):
        try:
            from minicpmv.web import page
        except ModuleNotFoundError as error:
            raise WebError(f"{error.name} is missing: pip install 'minicpmv[web]'") from error
        loaded, processor = terminal.load_shown(Console(stderr=True), model, revision, trust_remote_code)
        page.launch(page.build(loaded, processor, terminal.shown_name(model)), host, port, share, max_conversations)
