"""The way in of the OpenAI port: names each request, asks for its API key, counts it, and logs how it ended.

An ASGI application around the other one, so that what the other one never sees (an unknown route, a wrong key) is
counted and logged, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic.gateway.connection import CERTIFIED
from elastic.gateway.health import PATHS
from elastic.gateway.http import CLIENT_GONE_STATUS, error_response
from elastic.gateway.key_ring import Account, KeyRing
from membership.base.errors import RequestError

VISIT = "visit"  # in a request's state
TRACER = trace.get_tracer("elastic_ep.gateway")
PROPAGATOR = TraceContextTextMapPropagator()  # W3C: traceparent, tracestate
REQUEST_ID = re.compile(r"[!-~]{1,128}")

log = structlog.get_logger("elastic.access")


@dataclass
class Visit:
    """One HTTP request: who asks, and what came of it."""

    request_id: str  # as the client named it, or ""
    account: Account | None = None
    response_id: str = ""
    trace_id: int = 0  # of the client's trace, or of ours
    trace: str = ""  # W3C traceparent for the engine, if it is sampled
    status: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    def begin(self, response_id: str, prompt_tokens: int) -> None:
        """It is to be answered by generated tokens."""
        self.response_id, self.prompt_tokens = response_id, prompt_tokens
        if self.account is not None:
            self.account.prompt(prompt_tokens)

    def generated(self, tokens: int, finish_reason: str, queued_s: float = 0.0) -> None:
        """One of its choices has grown, or ended. `queued_s`: it had waited for a rank, and this is its first token."""
        self.generation_tokens += tokens
        if finish_reason:
            self.finish_reasons.append(finish_reason)
        if self.account is not None:
            self.account.generated(tokens, queued_s)


def visit_of(request: Request) -> Visit:
    """The visit that this request is part of."""
    visit: Visit = request.scope["state"][VISIT]
    return visit


class Access:
    """`logged`: write a line per request, except for those of probes and scrapes that went well.

    `certified`: clients show a certificate, except for probes and scrapes.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing,
        *,
        logged: bool,
        certified: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._keys, self._logged, self._certified, self._clock = app, keys, logged, certified, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        began, headers = self._clock(), Headers(scope=scope)
        named = headers.get("x-request-id", "")
        visit = Visit(named if REQUEST_ID.fullmatch(named) else "")
        scope.setdefault("state", {})[VISIT] = visit
        answer, entered = self._app, False
        try:
            visit.account = self._account(scope, headers)
            if visit.account is not None and scope["method"] == "POST":
                visit.account.enter(began)
                entered = True
        except RequestError as error:
            answer = error_response(error, {"WWW-Authenticate": "Bearer"} if error.status == 401 else None)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                if name := visit.request_id or visit.response_id:
                    MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            with TRACER.start_as_current_span("request", PROPAGATOR.extract(headers), trace.SpanKind.SERVER) as span:
                visit.trace_id = span.get_span_context().trace_id
                if span.get_span_context().trace_flags.sampled:
                    PROPAGATOR.inject(carrier := dict[str, str]())
                    visit.trace = carrier.get("traceparent", "")
                await answer(scope, receive, sent)
                span.set_attribute("http.response.status_code", visit.status)
        finally:
            visit.status = visit.status or CLIENT_GONE_STATUS
            if visit.account is not None:
                visit.account.answers[visit.status] += 1
                if entered:
                    visit.account.leave()
            if self._logged and (scope["path"] not in PATHS or visit.status >= 500):
                self._log(scope, visit, began)

    def _account(self, scope: Scope, headers: Headers) -> Account | None:
        needed = scope["path"] not in PATHS and scope["method"] != "OPTIONS"  # what browsers ask first has no key
        if needed and self._certified and not scope["state"].get(CERTIFIED):
            message = "this needs a client certificate"
            raise RequestError(message, status=403, code="client_certificate_required")
        return self._keys.account(headers.get("authorization", "")) if needed else None

    def _log(self, scope: Scope, visit: Visit, began: float) -> None:
        client = scope.get("client")
        log.info(
            "request_ended",
            method=scope["method"],
            path=scope["path"],  # without the query, which is the client's own
            status=visit.status,
            took_ms=round((self._clock() - began) * 1000, 3),
            client=client[0] if client else None,
            key=visit.account.name if visit.account else None,
            request=visit.request_id or None,
            response=visit.response_id or None,
            trace=f"{visit.trace_id:032x}" if visit.trace_id else None,
            prompt_tokens=visit.prompt_tokens,
            generation_tokens=visit.generation_tokens,
            finish_reasons=visit.finish_reasons,
        )
