"""The tables of docs/API.md that are written from the code: fields that are honoured, ignored and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from elastic.gateway.fields import EXTRAS, Extra, Place
from elastic.gateway.schema import ChatRequest, CompletionRequest

API_PAGE = Path("docs/API.md")
BEGIN, END = "<!-- fields, written by `make docs` -->", "<!-- (end of the fields) -->"
FAR = 2**31 - 1  # a bound that only keeps numbers within 64 bits


def api_page(text: str) -> str:
    """The text of docs/API.md with its tables of fields written anew."""
    part = "\n".join((BEGIN, "", *_honoured(), "", *_extras(), "", END))
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda found: part, text, flags=re.DOTALL)


def _honoured() -> list[str]:
    completion, chat = (shape.model_json_schema()["properties"] for shape in (CompletionRequest, ChatRequest))
    lines = ["| field | value | default | completions | chat |", "|---|---|---|---|---|"]
    for name in completion | chat:
        rows = [_described(each[name]) if name in each else "" for each in (completion, chat)]
        for row in dict.fromkeys(filter(None, rows)):  # two if the APIs differ
            lines.append(f"| `{name}` | {row} | {' | '.join('yes' if each == row else '' for each in rows)} |")
    return lines


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
    lines = ["| field | of | where | accepted | otherwise |", "|---|---|---|---|---|"]
    for extra in EXTRAS:
        if extra.off is None:
            accepted, otherwise = "any value, ignored", ""
        else:
            values = " ".join(f"`{json.dumps(value)}`" for value in extra.off)
            accepted, otherwise = values or "`null`", f"400: {extra.hint}"
        lines.append(f"| `{extra.name}` | {extra.of} | {_place(extra)} | {accepted} | {otherwise} |")
    return lines


def _place(extra: Extra) -> str:
    if extra.place is not Place.REQUEST:
        return f"`{extra.place}`"
    offered = [shape.model_fields for shape in (CompletionRequest, ChatRequest)]
    names = ["completions", "chat"]
    return ", ".join(api for api, fields in zip(names, offered, strict=True) if extra.name not in fields)
