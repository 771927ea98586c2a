"""What the gateway's two ports share: reading a body within limits, errors in OpenAI's shape, clients that go away."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from elastic.gateway.render import error_body
from elastic.gateway.schema import MAX_BODY_BYTES
from membership.base.errors import RequestError
from membership.base.timing import BODY_TIMEOUT_S

PARTS = "parts"  # in a request's state: its connection, as `Parts`
SILENCE = "silence"  # in a request's state: what may be written into its answer at any time, and says nothing
CLIENT_GONE_STATUS = 499  # only the access log shows it

log = structlog.get_logger(__name__)
T = TypeVar("T")


class Route(APIRoute):
    """Where GET is answered, HEAD is too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.methods is not None and "GET" in self.methods:
            self.methods.add("HEAD")


def new_app(title: str, *checks: Callable[[Request], None]) -> FastAPI:
    """An application without generated pages that answers errors in OpenAI's shape. `checks` run before each route."""
    guards = [Depends(check) for check in checks]
    app = FastAPI(
        title=title, docs_url=None, redoc_url=None, openapi_url=None, dependencies=guards, redirect_slashes=False
    )
    app.router.route_class = Route

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # one path may have several routes
            headers["Allow"] = ", ".join(sorted({*_methods(app, request.scope), "OPTIONS"}))
        if request.method == "OPTIONS" and error.status_code == 405:
            return Response(status_code=204, headers=headers)
        instead = _instead(app, request.url.path) if error.status_code == 404 else ""
        message = f"{request.method} {request.url.path}: {error.detail}{instead}"
        found = RequestError(message, status=error.status_code)
        return error_response(found, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return error_response(RequestError(f"{name}: {first['msg']}", param=name, code="invalid_value"))

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE_STATUS)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        log.exception("request_failed", path=request.url.path, exc_info=error)
        return error_response(internal_error())

    return app


def _methods(app: FastAPI, scope: Scope) -> Iterator[str]:
    """What the path of a request can be asked by."""
    for route in app.routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            yield from route.methods or ()


def _instead(app: FastAPI, path: str) -> str:
    """What may have been meant by an unknown path: what it ends with (`/v1` forgotten or twice), else all of /v1."""
    plain = "/".join(["", *filter(None, path.lower().split("/"))])
    known = sorted(route.path for route in app.routes if isinstance(route, Route) and "{" not in route.path)
    if near := [each for each in known if plain.endswith(each) or each == f"/v1{plain}"]:
        return f"; try {max(near, key=len)}"
    served = ", ".join(each for each in known if each.startswith("/v1/"))
    return f"; here are {served}" if served else ""


def internal_error() -> RequestError:
    """The answer to a client when the gateway has a bug."""
    return RequestError("internal error; the gateway's log has the details", status=500)


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Anything msgspec can encode."""
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """An error as clients expect it, with Retry-After where it makes sense."""
    headers = dict(headers or {})
    if error.retry_after_s > 0:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return json_response(error_body(error), error.status, headers)


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The body, unless it is too large, too slow or compressed."""
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise RequestError(f"Content-Encoding {coding}: a body is taken as it is, not compressed", status=415)
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s", status=408) from None
    return bytes(body)


def _too_large(limit: int) -> RequestError:
    return RequestError(f"the body is larger than {limit} bytes", status=413, code="body_too_large")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first (ClientDisconnect)."""
    job, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({job, gone}, return_when="FIRST_COMPLETED")
        if not job.done():
            raise ClientDisconnect
        return await job
    finally:
        for task in (job, gone):
            task.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


class Parts(Protocol):
    """A connection whose answer is a stream."""

    def takes_part(self) -> bool:
        """Whether it takes another part just now."""

    def write_part(self, data: bytes) -> None:
        """Send it."""


class Shortcut:
    """A way to a stream's client that needs no task, once the stream has begun; see `Generation.taker`."""

    def __init__(self) -> None:
        self.parts: Parts | None = None

    @property
    def is_open(self) -> bool:
        """Whether an event may go this way now."""
        return self.parts is not None and self.parts.takes_part()

    def write(self, event: bytes) -> None:
        """Send an event, if there is any. Only while it is open."""
        if event and self.parts is not None:
            self.parts.write_part(event)


class EventStream(StreamingResponse):
    """A stream of events. The generator is closed when the response ends, however it ends."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: dict[str, str],
        media_type: str = "text/event-stream",
        silence: bytes = b":\n\n",
        shortcut: Shortcut | None = None,
    ) -> None:
        """`shortcut`: for events that are not in the generator, between two that are."""
        self._events, self._silence, self._shortcut = events, silence, shortcut or Shortcut()
        plain = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=plain | headers, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, or nothing but its headers if only they were asked for."""
        scope.setdefault("state", {})[SILENCE] = self._silence
        try:
            if scope["method"] == "HEAD":
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body"})
            else:
                self._shortcut.parts = scope["state"].get(PARTS)
                await super().__call__(scope, receive, send)
        finally:
            self._shortcut.parts = None
            await self._events.aclose()
