"""What a request is for, in the one form that routes know, whatever its client or a proxy made of it.

A redirect instead would name a scheme and a host, which are the proxy's and not ours to know.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from elastic.gateway.http import error_response
from membership.base.errors import RequestError

MAX_HEADER_BYTES = 32 * 1024
ORIGIN = re.compile(r"https?://[^/]*", re.IGNORECASE)


def plain_path(path: str) -> str:
    """Without scheme and host, which a client writes for a proxy (RFC 9112, 3.2.2), and without a slash at its end."""
    origin = ORIGIN.match(path)
    return path[origin.end() if origin else 0 :].rstrip("/") or "/"


def header_bytes(scope: Scope) -> int:
    """How long a request's header is, about."""
    line = len(scope["method"]) + len(scope["raw_path"]) + len(scope["query_string"])
    return line + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


class Plain:
    """An application that gets plain paths, and no header that is too long, however many pieces it came in."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        answer: Any = self._app
        if header_bytes(scope) > MAX_HEADER_BYTES:
            answer = error_response(RequestError(f"the header is longer than {MAX_HEADER_BYTES} bytes", status=431))
        await answer({**scope, "path": plain_path(scope["path"])}, receive, send)
