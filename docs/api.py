"""The tables of docs/API.md that are written from the code: routes; fields that are honoured, ignored and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI
from fastapi.routing import APIRoute

from docs.other_servers import SGLANG, SGLANG_FIELDS, VLLM, VLLM_FIELDS
from elastic.gateway.admin import admin_app
from elastic.gateway.app import public_app
from elastic.gateway.fields import EXTRAS, Extra, Place
from elastic.gateway.health import PATHS
from elastic.gateway.page import with_page
from elastic.gateway.responses_schema import ResponsesRequest
from elastic.gateway.schema import ChatRequest, CompletionRequest, OpenShape

API_PAGE = Path("docs/API.md")
BEGIN, END = "<!-- fields, written by `make docs` -->", "<!-- (end of the fields) -->"
ROUTES = "<!-- routes, written by `make docs` -->", "<!-- (end of the routes) -->"
SHAPES: dict[str, type[OpenShape]] = {
    "completions": CompletionRequest, "chat": ChatRequest, "responses": ResponsesRequest,
}  # fmt: skip
OTHERS = {f"vLLM {VLLM}": VLLM_FIELDS, f"SGLang {SGLANG}": SGLANG_FIELDS}
FAR = 2**31 - 1  # a bound that only keeps numbers within 64 bits


def api_page(text: str) -> str:
    """The text of docs/API.md with its tables written anew."""
    tables = {ROUTES: _routes(), (BEGIN, END): (*_honoured(), "", *_extras())}
    for (begin, end), lines in tables.items():
        part = "\n".join((begin, "", *lines, "", end))
        text = re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda found, part=part: part, text, flags=re.DOTALL)
    return text


def served() -> Iterator[tuple[str, str, set[str]]]:
    """The port, path and methods of each route. The applications are made for it with nothing behind them."""
    nothing = cast(Any, SimpleNamespace(metrics=None, check=lambda request: None))
    admin = admin_app(nothing)
    for port, app in (("API", public_app(nothing, nothing)), ("admin", with_page(admin)), ("admin", admin)):
        yield from ((port, *route) for route in _of(app))


def _of(app: FastAPI) -> Iterator[tuple[str, set[str]]]:
    for route in app.routes:
        if not isinstance(route, APIRoute):
            raise TypeError(f"{route} is no route that the page can describe")
        yield route.path, set(route.methods or ())


def _routes() -> list[str]:
    found: dict[tuple[str, str], set[str]] = {}
    for port, path, methods in served():
        found.setdefault((path, port), set()).update(methods)
    lines = ["| path | methods beside `OPTIONS` | port | needs |", "|---|---|---|---|"]
    for (path, port), methods in sorted(found.items()):
        needs = "nothing" if path in PATHS or path.startswith("/ui") else "a key, if there are keys"
        needs = "the admin token" if port == "admin" and needs != "nothing" else needs
        lines.append(f"| `{path}` | {', '.join(f'`{each}`' for each in sorted(methods))} | {port} | {needs} |")
    return lines


def _honoured() -> list[str]:
    shapes = {api: shape.model_json_schema()["properties"] for api, shape in SHAPES.items()}
    heads = ("field", "value", "default", *SHAPES, *OTHERS)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(name for fields in shapes.values() for name in fields):
        rows = [_described(fields[name]) if name in fields else "" for fields in shapes.values()]
        for row in dict.fromkeys(filter(None, rows)):  # several if the APIs differ
            apis = [api for api, each in zip(SHAPES, rows, strict=True) if each == row]
            cells = ("yes" if api in apis else "" for api in SHAPES)
            lines.append(f"| `{name}` | {row} | {' | '.join(cells)} | {' | '.join(_elsewhere(name, apis))} |")
    return lines


def _elsewhere(name: str, apis: list[str]) -> Iterator[str]:
    """Which of these the other servers have the field for: all, or these."""
    for fields in OTHERS.values():
        there = [api for api in apis if name in fields.get(api, ())]
        yield "yes" if there == apis else ", ".join(there)


def _described(value: dict[str, Any]) -> str:
    default = value.get("default")
    return f"{_kind(value)} | " + ("" if default in (None, [], {}) else f"`{json.dumps(default)}`")


def _kind(value: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in value:
        return " or ".join(_kind(each) for each in value["anyOf"] if each.get("type") != "null")
    if "$ref" in value:
        return "object"
    kind = str(value.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(value['items'])}" + (f", at most {value['maxItems']}" if "maxItems" in value else "")
    if kind in ("integer", "number"):
        low, high = value.get("minimum", value.get("exclusiveMinimum")), value.get("maximum")
        over = "above " if "exclusiveMinimum" in value else ""
        if high is None or abs(high) >= FAR:
            return kind if low is None or abs(low) >= FAR else f"{kind} from {over}{low:g}"
        return f"{kind}, {over}{low:g} to {high:g}"
    return kind


def _extras() -> list[str]:
    heads = ("field", "of", "where", "accepted", "otherwise", *OTHERS)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for extra in EXTRAS:
        if extra.off is None:
            accepted, otherwise = "any value, ignored", ""
        else:
            values = " ".join(f"`{json.dumps(value)}`" for value in extra.off)
            accepted, otherwise = values or "`null`", f"400: {extra.hint}"
        places = _places(extra)
        where = ", ".join(places) if extra.place is Place.REQUEST else f"`{extra.place}`"
        others = " | ".join(_elsewhere(extra.name, places))
        lines.append(f"| `{extra.name}` | {extra.of} | {where} | {accepted} | {otherwise} | {others} |")
    return lines


def _places(extra: Extra) -> list[str]:
    """Where the field is one of those that are not offered."""
    if extra.place is not Place.REQUEST:
        return [extra.place]
    return [api for api in ("completions", "chat") if extra.name not in SHAPES[api].model_fields]
