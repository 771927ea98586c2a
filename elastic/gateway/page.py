"""The live page of the admin port: a few files, served as they are, before the admin API and without its token.

They hold nothing of the cluster. What the page shows comes over the admin API, with the token that it asks for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Response
from starlette.types import ASGIApp

from elastic.gateway.http import new_app

FILES = {
    "/ui": ("page.html", "text/html"),
    "/ui/page.css": ("page.css", "text/css"),
    "/ui/page.js": ("page.js", "text/javascript"),
    "/ui/events.js": ("events.js", "text/javascript"),
    "/ui/replay.js": ("replay.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def with_page(admin: ASGIApp) -> FastAPI:
    """The admin application, and the page beside it."""
    folder, app = files("elastic.gateway").joinpath("ui"), new_app("live page")
    for path, (name, kind) in FILES.items():
        app.get(path)(_file(folder.joinpath(name).read_bytes(), kind))
    app.router.default = admin
    return app


def _file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return answer
