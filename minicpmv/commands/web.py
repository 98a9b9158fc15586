"""`minicpmv web`: a page in the browser to talk with a model about images and videos."""

from typing import Annotated

import typer

from minicpmv.commands import options, terminal
from minicpmv.errors import one_line_errors, require


def web(
    model: options.Model = ".",
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=65535, help="Port to listen on; a free one from 7860 by default."),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public address, through a tunnel that Gradio runs.")
    ] = False,
    max_conversations: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most conversations kept; the one unused for longest is forgotten.")
    ] = 16,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Open a page to talk with a model: images, videos, camera, thinking, and what the model sees.

    Examples:

    \b
      minicpmv web
      minicpmv web -m nano --port 8080
      minicpmv web --host 0.0.0.0
    """
    from rich.console import Console

    with one_line_errors(OSError):
        require("web", "gradio")
        from minicpmv.web import page
        from minicpmv.web.conversation import Conversations

        loaded, processor = terminal.load_shown(Console(stderr=True), model, revision, trust_remote_code)
        conversations = Conversations(loaded, processor, max_conversations)
        page.launch(page.build(conversations, terminal.shown_name(model)), host, port, share)
