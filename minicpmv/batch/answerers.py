"""Who answers the requests of a batch: an engine in this process, a server of vLLM of its own, or an API elsewhere.

All take the body of a chat completion and give one back, from many threads at once.
"""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from minicpmv.errors import MiniCPMVError, require
from minicpmv.serving.choice import Engine, EngineError, choose_engine


PR_SET_PDEATHSIG = 1
START_SECONDS = 1800  # for vLLM to load and compile a model
STOP_SECONDS = 60


class RefusedError(MiniCPMVError):
    """One request is refused; others may be answered."""

    def __init__(self, message: str, code: str | int | None = None) -> None:
        super().__init__(message)
        self.code = code


class Answerer(Protocol):
    """Anyone who answers chat completions."""

    as_files: bool  # whether it reads files of this machine, by their file: addresses

    def answer(self, what: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The chat completion to a request.

        Args:
            what: is asked, for messages.

        Raises:
            RefusedError: this request is refused.
            MiniCPMVError: no request will be answered any more.
        """

    def close(self) -> None: ...


@dataclass(frozen=True)
class AnswererOptions:
    """Who is to answer. Small, and for any process that opens it.

    Args:
        model: a folder, GGUF file or Hub repository; with an endpoint the name that it knows.
        engine: `"auto"`: llama.cpp for a GGUF file, vLLM where it and an accelerator are, else transformers.
        concurrency: most requests at once.
        endpoint: the address of an API to ask instead.
        media_hosts: fetched from though they are not public.
    """

    model: str
    engine: Engine = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    concurrency: int = 16
    endpoint: str | None = None
    api_key: str | None = None
    retries: int = 6
    timeout: float = 600
    media_hosts: tuple[str, ...] = ()
    max_megabytes: float = 64

    def open(self) -> Answerer:
        """Ready to answer.

        Raises:
            MiniCPMVError: the model cannot be loaded, or the endpoint does not answer.
        """
        if self.endpoint is not None:
            return Remote(self, self.endpoint)
        return OwnServer(self) if choose_engine(self.engine, self.model) == "vllm" else Local(self)


class Local:
    """An engine in this process: PyTorch, or llama.cpp for a GGUF file."""

    as_files = True

    def __init__(self, options: AnswererOptions) -> None:
        require("batch", "httpcore", "pydantic")
        from transformers.utils.logging import disable_progress_bar

        from minicpmv.checkpoint import load
        from minicpmv.serving.engine import LocalEngine
        from minicpmv.serving.limits import Limits

        if not sys.stderr.isatty():
            disable_progress_bar()
        loaded = load(options.model, revision=options.revision, trust_remote_code=options.trust_remote_code)
        rows = 2 * options.concurrency  # a worker of Ray begins a piece while it ends another
        limits = Limits(
            megabytes=options.max_megabytes,
            hosts=frozenset(options.media_hosts),
            requests=rows,
            total_megabytes=rows * options.max_megabytes,
        )
        self._engine = LocalEngine(
            *loaded, Path(options.model).resolve().name, limits=limits, max_rows=options.concurrency
        )

    def answer(self, what: str, body: Mapping[str, Any]) -> dict[str, Any]:
        from minicpmv.serving.schema import RequestError

        try:
            return self._engine.answer({**body, "model": None}, local_files=Path("/"))
        except RequestError as error:
            if error.status == 503:
                raise EngineError(f"the engine has stopped: {error}") from error
            raise RefusedError(str(error), error.code) from error

    def close(self) -> None:
        self._engine.close()


class Remote:
    """An API elsewhere. Connections that fail, and answers that ask for patience, are tried again."""

    as_files = False

    def __init__(self, options: AnswererOptions, url: str) -> None:
        from minicpmv.evaluate.client import ChatClient

        self.client = ChatClient(
            url,
            options.model,
            api_key=options.api_key,
            concurrency=options.concurrency,
            retries=options.retries,
            timeout=options.timeout,
        )
        self.client.check()

    def answer(self, what: str, body: Mapping[str, Any]) -> dict[str, Any]:
        from minicpmv.evaluate import client

        if not isinstance(body.get("messages"), list):
            raise RefusedError("messages: a list is needed")
        try:
            return self.client.complete(what, {**body, "model": self.client.model}).model_dump(exclude_unset=True)
        except client.RefusedError as error:
            raise RefusedError(str(error), getattr(error.__cause__, "code", None)) from error

    def close(self) -> None:
        pass


class OwnServer(Remote):
    """`minicpmv serve --engine vllm`: vLLM's own server with the plugin, in a process that lives as long as this one.

    It reads files of this machine, so that only who knows its key may ask.
    """

    as_files = True

    def __init__(self, options: AnswererOptions) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        name = Path(options.model).resolve().name
        words = ["serve", "--model", options.model, "--engine", "vllm", "--host", "127.0.0.1", "--port", port]
        words += ["--served-name", name, "--max-rows", 2 * options.concurrency]
        words += ["--max-megabytes", options.max_megabytes]
        words += [word for host in options.media_hosts for word in ("--media-host", host)]
        words += ["--revision", options.revision] if options.revision else []
        words += ["--trust-remote-code"] if options.trust_remote_code else []
        command = [sys.executable, "-m", "minicpmv", *map(str, words), "--", "--allowed-local-media-path", "/"]
        key = secrets.token_hex(32)
        self._process = start_child(command, {**os.environ, "MINICPMV_API_KEY": key})
        try:
            self._await(f"http://127.0.0.1:{port}/health")
            super().__init__(replace(options, model=name, api_key=key), f"http://127.0.0.1:{port}/v1")
        except BaseException:
            self.close()
            raise

    def _await(self, address: str) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if (status := self._process.poll()) is not None:
                raise EngineError(f"vLLM ended with exit code {status} before it answered; what it wrote stands above")
            try:
                with urllib.request.urlopen(address, timeout=5):
                    return
            except OSError:
                time.sleep(1)
        raise EngineError(f"vLLM did not answer within {START_SECONDS} seconds")

    def close(self) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):  # the processes that it started, where they are left, and have their GPUs
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def start_child(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """A process that gets SIGTERM when this one ends, killed or not (Linux alone). What it says goes to stderr.

    Ctrl-C does not reach it, as it has a session of its own: it is for this process to end it.
    """
    parent, started, libc = os.getpid(), Future[subprocess.Popen[bytes]](), ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before that
            os._exit(1)

    def keep() -> None:
        try:
            process = subprocess.Popen(
                command, env=environment, stdout=sys.stderr, start_new_session=True, preexec_fn=end_with_parent
            )
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(process)
        process.wait()

    # The parent whose end counts is a thread: one that waits as long as the child lives.
    Thread(target=keep, daemon=True).start()
    return started.result()
