"""`minicpmv serve`: a server that OpenAI's clients can talk to."""

from typing import TYPE_CHECKING, Annotated

import typer

from minicpmv.commands import options, terminal
from minicpmv.errors import MiniCPMVError, one_line_errors, require
from minicpmv.serving.choice import choose_engine


if TYPE_CHECKING:
    import socket

PACKAGES = ("fastapi", "httpcore", "prometheus_client", "pydantic", "uvicorn")
ROWS, LLAMA_CPP_ROWS = 16, 8  # the latter has room for all of them from the start
REQUESTS, PREFIX_MEGABYTES = 64, 2048
CONNECTIONS = 1024
STOP_SECONDS = 5  # for answers to end when the server is stopped


class ServerError(MiniCPMVError):
    """The server cannot be started: the message says why and what to do."""


def serve(
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="Options of vLLM's own server.", show_default=False),
    ] = None,
    model: options.Model = ".",
    engine: Annotated[
        options.Engine,
        typer.Option(
            help="What runs the model; auto: llama.cpp for a GGUF file, vllm where it is installed and there is a GPU."
        ),
    ] = options.Engine.AUTO,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    served_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What requests call the model; by default the name of its folder."),
    ] = None,
    think: Annotated[bool, typer.Option("--think", help="Think where a request does not say whether to.")] = False,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="MINICPMV_API_KEY",
            help="Ask for this key; repeatable. Others may see it in the list of processes: the variable is safer.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help='Let pages from here ask, such as https://example.org; "*" lets all; repeatable.'
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help='Also answer requests to this host name, such as that of a proxy; "*" lets all; repeatable. '
            "By default a server on a loopback address goes by localhost alone, any other by all names.",
        ),
    ] = None,
    media_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also fetch images and videos from this host, which is not public; repeatable. In vLLM: from these hosts only.",
        ),
    ] = None,
    max_megabytes: Annotated[
        float, typer.Option(metavar="N", min=1, help="Most megabytes of a request, and of what is fetched for it.")
    ] = 64,
    max_requests: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Most requests at work, 64 by default; others are told to come back."),
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Most answers written at the same time: 16, or 8 in llama.cpp."),
    ] = None,
    prefix_megabytes: Annotated[
        float | None,
        typer.Option(metavar="N", min=0, help="How much of earlier conversations to keep ready; 2048 by default."),
    ] = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer over HTTP as OpenAI's API does.

    Examples:

    \b
      minicpmv serve -m nano
      minicpmv serve -m ~/MiniCPM-V-4_5 --host 0.0.0.0 --port 8080
      minicpmv serve -m ~/MiniCPM-V-4_5 --engine vllm -- --tensor-parallel-size 2
    """
    import socket
    from ipaddress import ip_address

    from rich.console import Console

    with one_line_errors():
        chosen = choose_engine(engine.value, model)
        name = served_name or terminal.shown_name(model)
        if chosen == "vllm":
            for option, given in {"--allowed-host": allowed_host, "--prefix-megabytes": prefix_megabytes}.items():
                if given is not None:
                    raise ServerError(
                        f"{option} is no option of vLLM's server: leave it out, or choose another --engine"
                    )
            from minicpmv.deploy.vllm.server import serve as serve_vllm

            serve_vllm(
                model,
                name=name,
                host=host,
                port=port,
                think=think,
                api_keys=api_key or (),
                cors_origins=cors_origin or (),
                media_hosts=media_host or (),
                max_megabytes=max_megabytes,
                max_requests=max_requests,
                max_rows=max_rows,
                revision=revision,
                trust_remote_code=trust_remote_code,
                extra=vllm_options or (),
            )
            return
        if vllm_options:
            raise ServerError(
                f"{' '.join(vllm_options)}: these are for vLLM's server, and the engine is {chosen}; leave them out"
            )
        require("serve", *PACKAGES)
        listener = open_port(host, port)
        loaded, processor = terminal.load_shown(Console(stderr=True), model, revision, trust_remote_code)

        import uvicorn

        from minicpmv.serving import log
        from minicpmv.serving.app import build_app
        from minicpmv.serving.doors import LOOPBACK
        from minicpmv.serving.engine import LocalEngine
        from minicpmv.serving.limits import Limits

        hosts = frozenset(media.lower() for media in media_host or ())
        limits = Limits(megabytes=max_megabytes, hosts=hosts, requests=max_requests or REQUESTS)
        host, port = listener.getsockname()[:2]
        names = frozenset(allowed.lower() for allowed in allowed_host or ())
        rows = max_rows or (LLAMA_CPP_ROWS if chosen == "llama.cpp" else ROWS)
        is_open = "*" in names or not (names or ip_address(host).is_loopback)
        with LocalEngine(
            loaded,
            processor,
            name,
            think,
            limits,
            rows,
            PREFIX_MEGABYTES if prefix_megabytes is None else prefix_megabytes,
        ) as local:
            app = build_app(
                local,
                api_keys=api_key or (),
                cors_origins=cors_origin or (),
                allowed_hosts=None if is_open else names | LOOPBACK,
            )
            shown = f"[{host}]" if listener.family == socket.AF_INET6 else host
            terminal.write(f"{name} answers at http://{shown}:{port}/v1 (Ctrl-C ends it)")
            config = uvicorn.Config(
                app,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=STOP_SECONDS,
                access_log=False,
                log_config=log.configure(),
            )
            uvicorn.Server(config).run(sockets=[listener])


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
