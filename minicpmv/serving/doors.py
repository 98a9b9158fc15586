"""Who may ask, and what is noted of it: host names, web pages, keys, request ids, one line in the log."""

import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from minicpmv.serving.schema import RequestError


logger = logging.getLogger("minicpmv.serving")

SAFE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class FrontDoor:
    """ASGI middleware: refuses host names and web pages that are not expected, gives each request an id, and logs it.

    A page in a browser may send requests to servers of its user's own network: those say where they come from (Origin). One
    whose own name was pointed to this machine passes for a page of this server, but for the name (Host).

    Args:
        hosts: names that requests may use; None lets all.
        origins: web pages that may ask besides the server's own; "*" lets all.
        answered: called with route, status and seconds.
    """

    def __init__(
        self,
        app: Any,
        hosts: frozenset[str] | None,
        origins: frozenset[str],
        answered: Callable[[str, int, float], None],
    ) -> None:
        self.app, self.hosts, self.origins, self.answered = app, hosts, origins, answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # the client has gone
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = message | {"headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        try:
            if reason := self._refusal(headers):
                await send_error(RequestError(reason, status=403), send_with_id)
            else:
                await self.app(scope, receive, send_with_id)
        except BaseException:
            status = 500 if status == 499 else status
            raise
        finally:
            seconds = time.perf_counter() - start
            self.answered(getattr(scope.get("route"), "path", "other"), status, seconds)
            facts = {
                "id": request_id.decode(),
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(seconds, 3),
            }
            logger.info("request", extra={"facts": facts})

    def _refusal(self, headers: dict[bytes, bytes]) -> str | None:
        """Why a request is not let in."""
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        if self.hosts is not None and _name(host) not in self.hosts:
            return f"This server does not go by the name {host[:100]!r}: see --allowed-host."
        if origin and not self.origins & {"*", origin} and urlsplit(origin).netloc != host:
            return f"Pages of {origin[:100]!r} may not ask here: see --cors-origin."
        return None


def _name(host: str) -> str:
    """A host without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host


def is_key(given: str, keys: Iterable[str]) -> bool:
    """Whether a key is one of those that are let in; it takes as long whichever it is."""
    return any([hmac.compare_digest(given.encode(), key.encode()) for key in keys])


async def send_error(error: RequestError, send: Any) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
