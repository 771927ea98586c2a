"""Structured output: which forms are understood, and which are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.gateway.schema import ChatRequest, parse
from elastic.gateway.structured import form_of, grammar_of
from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import RequestError
from tests.support import ROOT
from tests.support.wild_tokenizers import write_wild_tokenizer
from workers.model.grammar import Grammars

pytestmark = pytest.mark.unit

FILE = ROOT / "elastic" / "demo" / "checkpoint" / "tokenizer.json"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def grammar(file: Path = FILE, ends: tuple[int, ...] = (1,), **fields: Any) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    form = form_of(parse(json.dumps(body).encode(), ChatRequest))
    return grammar_of(form, file, ends) if form is not None else ""


def follows(found: str, text: str) -> bool:
    """Whether the text is a whole answer under the grammar."""
    tokens = np.array(Tokenizer(FILE.parent).encode(text, special=False), np.uint32)
    return bool(Grammars(FILE, [1]).allowed(found, tokens, 1024)[1])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"response_format": {"type": "json_object"}}, '{"b": [1, null]}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            '{"a": 5}',
        ),
        ({"guided_json": SCHEMA}, '{"a":5}'),
        ({"guided_json": json.dumps(SCHEMA)}, '{\n    "a": 5\n}'),
        ({"structured_outputs": {"json": SCHEMA}}, '{"a": -1}'),
        ({"structured_outputs": {"json_object": True}}, "{}"),
        ({"structured_outputs": {"regex": "a{2,3}b"}}, "aab"),
        ({"guided_choice": ['say "no"', "wörld\n", "/x/ | y"]}, "wörld\n"),
        ({"guided_choice": ['say "no"', "wörld\n", "/x/ | y"]}, 'say "no"'),
        ({"guided_choice": ['say "no"', "wörld\n", "/x/ | y"]}, "/x/ | y"),
        ({"guided_grammar": 'start: "x" start | "y"'}, "xxxy"),
    ],
)
def test_forms(fields: dict[str, Any], text: str) -> None:
    assert follows(grammar(**fields), text)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"guided_json": None}])
def test_no_form(fields: dict[str, Any]) -> None:
    assert grammar(**fields) == ""


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema is required", "response_format"),
        ({"response_format": {"type": "xml"}}, "Input should be", "response_format.type"),
        ({"guided_json": {"type": "nothing"}}, "cannot be followed: Invalid type", "guided_json"),
        ({"guided_json": "{"}, "cannot be followed", "guided_json"),
        ({"guided_json": {"$ref": "http://127.0.0.1:1/x"}}, "does not fetch", "guided_json"),
        ({"guided_regex": "("}, "unclosed group", "guided_regex"),
        ({"guided_grammar": "x: y"}, "no start rule", "guided_grammar"),
        ({"guided_choice": []}, "at least 1 item", "guided_choice"),
        ({"guided_regex": "a" * 70_000}, "longer than", "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "only one of guided_regex, guided_choice", "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos does not go with it", "ignore_eos"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens does not go with it", "min_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(fields: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(RequestError, match=message) as refusal:
        grammar(**fields)
    assert (refusal.value.status, refusal.value.param) == (400, param)


def test_a_model_that_cannot_follow_any(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no end token") as refusal:
        grammar(ends=(), guided_regex="a")
    assert refusal.value.status == 501
    other = write_wild_tokenizer(tmp_path, "bert") / "tokenizer.json"
    with pytest.raises(RequestError, match="not supported with this model"):
        grammar(other, guided_regex="a")
