"""`minicpmv serve`: a server that OpenAI's clients can talk to."""

from typing import Annotated

import typer

from minicpmv.commands import terminal
from minicpmv.errors import MiniCPMVError, one_line_errors


OLDEST_TRANSFORMERS = "5.23"  # its server, on which this one stands, looked different before
PACKAGES = ("fastapi", "httpcore", "openai", "pydantic", "uvicorn")


class ServerError(MiniCPMVError):
    """The server cannot be started: the message says why and what to do."""


def serve(
    model: Annotated[str, typer.Argument(help="Model folder or Hub repository.")] = ".",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    think: Annotated[bool, typer.Option("--think", help="Think first where a request does not say.")] = False,
    media_host: Annotated[
        list[str] | None,
        typer.Option(help="A host whose pictures are fetched though it is not on the public internet; repeatable."),
    ] = None,
    max_megabytes: Annotated[
        float, typer.Option(min=1, help="Most megabytes of a request, and of what is fetched for it.")
    ] = 64,
    revision: terminal.Revision = None,
    trust_remote_code: terminal.TrustRemoteCode = False,
):
    """Answer over HTTP as OpenAI's chat completions do, on the server of transformers.

    Examples:

      minicpmv serve nano

      minicpmv serve ~/MiniCPM-V-4_5 --host 0.0.0.0 --port 8080

      minicpmv serve nano --media-host files.example.internal
    """
    import socket

    from rich.console import Console

    from minicpmv.checkpoint import CheckpointError

    with one_line_errors(ServerError, CheckpointError):
        check_requirements()
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
        typer.echo(f"{name} answers at http://{shown}:{port}/v1 (Ctrl+C ends it)")
        config = uvicorn.Config(app, limit_concurrency=128, timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listener])


def check_requirements():
    """Raises:
    ServerError: transformers is too old, or packages are missing.
    """
    from importlib.util import find_spec

    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ServerError(
            f"the server needs transformers {OLDEST_TRANSFORMERS} or newer, and this is {transformers.__version__}: "
            f"pip install 'transformers[serving]>={OLDEST_TRANSFORMERS}'"
        )
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ServerError(f"the server needs {', '.join(missing)}: pip install 'minicpmv[serve]'")


def open_port(host: str, port: int):
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
            f"{host}:{port} cannot be listened at ({error}); give --port and --host a free one"
        ) from error
    return listener
