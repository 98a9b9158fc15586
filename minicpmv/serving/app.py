"""The HTTP side: OpenAI's routes over an engine.

What is special:
- A body is bounded while it comes, and parsed in a thread, so other clients do not wait for it.
- An answer ends when its client has gone, streamed or not.
- Whatever goes wrong is told in the form of OpenAI's API.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL import EpsImagePlugin
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minicpmv.serving.doors import FrontDoor, is_key
from minicpmv.serving.engine import LocalEngine
from minicpmv.serving.limits import Room, check_body, no_memory
from minicpmv.serving.metrics import Metrics
from minicpmv.serving.schema import ChatRequest, CompletionRequest, GenerationRequest, RequestError, read_request


logger = logging.getLogger("minicpmv.serving")

BODY_SECONDS = 60  # for a body to come
SCHEMAS = "#/components/schemas/{model}"


def build_app(
    engine: LocalEngine,
    *,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    allowed_hosts: frozenset[str] | None = None,
) -> FastAPI:
    """The ASGI app that asks `engine`.

    Args:
        api_keys: one of them is needed for what is under /v1; none asks for no key.
        cors_origins: web pages that may ask besides the server's own, such as "https://example.org"; "*" lets all.
        allowed_hosts: names that the server goes by; None lets all.
    """
    EpsImagePlugin.gs_binary = False  # an EPS image is a program, which Ghostscript would run
    metrics, started = Metrics(engine), int(time.time())
    app = FastAPI(title="MiniCPM-V", description="OpenAI's chat completions with images and videos.")
    bearer = HTTPBearer(auto_error=False)

    def check_key(given: HTTPAuthorizationCredentials | None = Depends(bearer)) -> None:  # noqa: B008
        if api_keys and not (given and is_key(given.credentials, api_keys)):
            raise RequestError(
                "Give one of the server's API keys: Authorization: Bearer KEY.", 401, code="invalid_api_key"
            )

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    @v1.post("/chat/completions", openapi_extra=_body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await _answer(engine, request, ChatRequest)

    @v1.post("/completions", openapi_extra=_body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Go on with a text."""
        return await _answer(engine, request, CompletionRequest)

    card = {"id": engine.name, "object": "model", "created": started, "owned_by": "minicpmv"}
    card |= {"max_model_len": engine.context}

    @v1.get("/models")
    def models() -> dict[str, Any]:
        """The models that are here: one."""
        return {"object": "list", "data": [card]}

    @v1.get("/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        """A model."""
        if name != engine.name:
            raise RequestError(
                f"The model {name[:100]!r} is not here; this server has {engine.name!r}.", 404, code="model_not_found"
            )
        return card

    app.include_router(v1)

    @app.get("/health")
    async def health() -> Response:  # not in a thread, for which requests at work may let it wait
        """Whether answers can be expected."""
        is_alive = engine.stats().is_alive
        return JSONResponse({"status": "ok" if is_alive else "the model has stopped"}, 200 if is_alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def prometheus() -> Response:
        """Counts, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return JSONResponse(RequestError(what, error.status_code).body(), error.status_code, error.headers)

    @app.exception_handler(MemoryError)
    async def no_room(request: Request, error: MemoryError) -> Response:
        return await refused(request, no_memory())

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(_failure().body(), 500)

    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    origins = frozenset(origin.lower().rstrip("/") for origin in cors_origins)
    app.add_middleware(FrontDoor, hosts=allowed_hosts, origins=origins, answered=metrics.answered)
    _describe_bodies(app)
    return app


# ---- one request ----


async def _answer(engine: LocalEngine, request: Request, kind: type[GenerationRequest]) -> Response:
    """The response to a request, or the stream of it."""
    taken = 0
    try:
        body = await _body(request, int(engine.limits.megabytes * 1e6), engine.bytes)
        taken = len(body)
        await anyio.to_thread.run_sync(check_body, body, engine.limits.text_bytes(engine.context))
        parsed = await anyio.to_thread.run_sync(read_request, kind, body)
        del body
        if not parsed.stream:
            return JSONResponse(await _while_there(request, engine.chat(parsed)))
        chunks = engine.stream(parsed)
        try:
            first = await _while_there(request, anext(chunks))
        except BaseException:
            await chunks.aclose()
            raise
        held, taken = taken, 0
        return EventStream(first, chunks, partial(engine.bytes.give_back, held))
    except (ClientGone, ClientDisconnect):
        return Response(status_code=499)
    finally:
        engine.bytes.give_back(taken)


class ClientGone(Exception):
    """Nobody waits for the answer."""


async def _while_there(request: Request, work: Any) -> Any:
    """What a coroutine returns; it is cancelled when the client goes.

    Raises:
        ClientGone: it has gone.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return await task
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, most: int, room: Room) -> bytes:
    """The body of a request; its bytes are taken from `room`, for the caller to give back.

    Raises:
        RequestError: it is larger than `most` bytes, does not come, or there is no room for it.
    """
    too_large = RequestError(
        f"The body of a request may have {most} bytes. Scale images down, or send their addresses.",
        413,
        code="request_too_large",
    )
    body = bytearray()
    try:
        if int(request.headers.get("content-length") or 0) > most:
            raise too_large
        with anyio.fail_after(BODY_SECONDS):
            async for piece in request.stream():
                room.take(len(piece))
                body += piece
                if len(body) > most:
                    raise too_large
        return bytes(body)
    except BaseException as error:
        room.give_back(len(body))
        if isinstance(error, TimeoutError):
            late = f"The body of the request did not come within {BODY_SECONDS} seconds."
            raise RequestError(late, 408) from error
        raise


# ---- streams ----


class EventStream(StreamingResponse):
    """Server-sent events of the chunks of an answer.

    Args:
        end: called once they have ended, however that came, even where they never began.
    """

    def __init__(self, first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None], end: Callable[[], None]):
        super().__init__(_events(first, chunks), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._chunks, self._end = chunks, end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()
            with anyio.CancelScope(shield=True):
                await self._chunks.aclose()


async def _events(first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    try:
        yield _event(first)
        async for chunk in chunks:
            yield _event(chunk)
    except RequestError as error:
        yield _event(error.body())
    except Exception:  # the response has begun: this is the only way left to tell
        logger.exception("a stream failed")
        yield _event(_failure().body())
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _failure() -> RequestError:
    return RequestError("The server failed; its log says why.", 500)


# ---- the description of the routes ----


def _body_of(kind: type[GenerationRequest]) -> dict[str, Any]:
    schema = {"$ref": SCHEMAS.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe_bodies(app: FastAPI) -> None:
    """Add the schemas of bodies, which the routes read themselves, to the description of the routes."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = describe().setdefault("components", {}).setdefault("schemas", {})
            for kind in (ChatRequest, CompletionRequest):
                schema = kind.model_json_schema(ref_template=SCHEMAS)
                schemas |= schema.pop("$defs", {}) | {kind.__name__: schema}
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]
