"""`minicpmv serve`: a server that OpenAI's clients can talk to."""

from typing import TYPE_CHECKING, Annotated

import typer

from minicpmv.commands import options, terminal
from minicpmv.errors import MiniCPMVError, one_line_errors, require


if TYPE_CHECKING:
    import socket

OLDEST_TRANSFORMERS = "5.23"  # its server, on which this one stands, looked different before
PACKAGES = ("fastapi", "httpcore", "openai", "pydantic", "uvicorn")


class ServerError(MiniCPMVError):
    """The server cannot be started: the message says why and what to do."""


def serve(
    model: options.Model = ".",
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    think: Annotated[bool, typer.Option("--think", help="Think where a request does not say whether to.")] = False,
    media_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Also fetch images from this host, which is not public; repeatable."),
    ] = None,
    max_megabytes: Annotated[
        float, typer.Option(metavar="N", min=1, help="Most megabytes of a request, and of what is fetched for it.")
    ] = 64,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer over HTTP as OpenAI's chat completions do, on the server of transformers.

    Examples:

    \b
      minicpmv serve -m nano
      minicpmv serve -m ~/MiniCPM-V-4_5 --host 0.0.0.0 --port 8080
      minicpmv serve -m nano --media-host files.example.internal
    """
    import socket

    from rich.console import Console

    with one_line_errors():
        require("serve", *PACKAGES)
        check_transformers()
        listener = open_port(host, port)
        loaded, processor = terminal.load_shown(Console(stderr=True), model, revision, trust_remote_code)

        import uvicorn

        from minicpmv.serving.app import build_app
        from minicpmv.serving.media import MediaLimits

        name = terminal.shown_name(model)
        hosts = frozenset(media.lower() for media in media_host or ())
        app = build_app(loaded, processor, name, think, MediaLimits(megabytes=max_megabytes, hosts=hosts))
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if listener.family == socket.AF_INET6 else host
        terminal.write(f"{name} answers at http://{shown}:{port}/v1 (Ctrl-C ends it)")
        config = uvicorn.Config(app, limit_concurrency=128, timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listener])


def check_transformers() -> None:
    """Refuse a transformers whose server looked different.

    Raises:
        ServerError: it is too old.
    """
    from importlib.metadata import version

    from packaging.version import Version

    if Version(version("transformers")) < Version(OLDEST_TRANSFORMERS):
        raise ServerError(
            f"the server needs transformers {OLDEST_TRANSFORMERS} or newer, and this is {version('transformers')}: "
            f"pip install 'transformers[serving]>={OLDEST_TRANSFORMERS}'"
        )


def open_port(host: str, port: int) -> "socket.socket":
    """A socket bound to the address, before the model is loaded: else one would wait for nothing.

    Raises:
        ServerError: the address is none of this machine's, or taken.
    """
    import socket

    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ServerError(
            f"{host}:{port} cannot be listened on ({error}); give --port and --host a free one"
        ) from error
    return listener
