"""Structured output: which forms are understood, and which are refused by name."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from elastic.gateway.schema import ChatRequest, parse
from elastic.gateway.structured import Forms
from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import RequestError
from tests.support import ROOT
from tests.support.wild_tokenizers import WILD, write_wild_tokenizer
from workers.model.grammar import Grammars
from workers.model.text_files import end_token_of_tokenizer

pytestmark = pytest.mark.unit

FILE = ROOT / "elastic" / "demo" / "checkpoint" / "tokenizer.json"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
IN_PROPERTY = {"type": "object", "properties": {"a": {"type": "array", "items": {"not": {"type": "string"}}}}}
IN_DEFINITION = {
    "$defs": {"x": {"type": "string", "pattern": "(?=a)b"}},
    "anyOf": [{"type": "null"}, {"$ref": "#/$defs/x"}],
}


def grammar(*, spelled: bool = True, ends: tuple[int, ...] = (1,), **fields: Any) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    asked = parse(json.dumps(body).encode(), ChatRequest)
    return asyncio.run(Forms(spelled, ends).grammar(asked))


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
        ({"guided_choice": ["a\x01 [b]", ""]}, "a\x01 [b]"),
        ({"guided_choice": ["a\x01 [b]", ""]}, ""),
        ({"guided_grammar": 'start: "x" start | "y"'}, "xxxy"),
        ({"guided_regex": "a|bc", "min_tokens": 9}, "bc"),
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
        ({"guided_json": IN_PROPERTY}, r"at /properties/a/items: Unimplemented keys: ..not", "guided_json"),
        ({"guided_json": IN_DEFINITION}, r"at /anyOf/1: .*look-ahead", "guided_json"),
        ({"guided_json": {"uniqueItems": True, "x-guidance": {"lenient": True}}}, "uniqueItems", "guided_json"),
        ({"guided_grammar": 'start: %json {"not": {}, "x-guidance": {"lenient": true}}'}, "not", "guided_grammar"),
        ({"guided_json": "{"}, "is not valid JSON", "guided_json"),
        ({"guided_json": "[" * 20_000}, "is not valid JSON", "guided_json"),
        ({"guided_json": "[]"}, "is not a JSON object", "guided_json"),
        ({"guided_json": {"$ref": "#"}}, "no text follows it", "guided_json"),
        ({"guided_regex": r"[^\s\S]"}, "no text follows it", "guided_regex"),
        ({"guided_grammar": "start: <|im_end|>"}, "special token", "guided_grammar"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex cannot", "structured_outputs.regex"),
        ({"guided_json": {"$ref": "http://127.0.0.1:1/x"}}, "does not fetch", "guided_json"),
        ({"guided_regex": "("}, "unclosed group", "guided_regex"),
        ({"guided_grammar": "x: y"}, "no start rule", "guided_grammar"),
        ({"guided_choice": []}, "at least 1 item", "guided_choice"),
        ({"guided_regex": "a" * 70_000}, "longer than", "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "only one of guided_regex, guided_choice", "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos does not go with it", "ignore_eos"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(fields: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(RequestError, match=message) as refusal:
        grammar(**fields)
    assert (refusal.value.status, refusal.value.param) == (400, param)


def test_what_costs_too_much_is_refused() -> None:
    schema = {"allOf": [{"anyOf": [{"properties": {f"{n}{k}": {}}} for k in "ab"]} for n in range(16)]}
    with pytest.raises(RequestError, match=r"cannot be followed: schema too large"):
        grammar(guided_json=schema)


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "(a{1000}){1000}"},  # took 20 s, and as long in a step of a rank
        {"guided_json": {"allOf": [{"type": "string", "minLength": 100_000, "pattern": "^a*$"}]}},
        {"guided_grammar": 'start: "abc"{100000}'},
    ],
)
def test_a_short_form_of_a_long_text_without_a_choice_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="begins with more than 1000 characters"):
        grammar(**fields)


def test_long_texts_with_a_choice_or_written_out_are_followed() -> None:
    assert grammar(guided_regex="[a-z]{1,5000}")
    assert grammar(guided_regex="a{900}")
    assert grammar(guided_json={"const": "a" * 20_000})


def test_models_that_cannot_follow_any() -> None:
    with pytest.raises(RequestError, match="no end token") as refusal:
        grammar(ends=(), guided_regex="a")
    assert refusal.value.status == 501
    with pytest.raises(RequestError, match="not supported with this model: its tokenizer") as refusal:
        grammar(spelled=False, guided_regex="a")
    assert refusal.value.status == 501


@pytest.mark.parametrize("kind", WILD)
def test_each_tokenizer_is_followed_or_refused(kind: str, tmp_path: Path) -> None:
    """By byte level or byte fallback: what ranks can follow, gateways offer. Random answers are JSON of the schema."""
    folder = write_wild_tokenizer(tmp_path, kind)
    tokenizer = Tokenizer(folder)
    end = (*end_token_of_tokenizer(folder), 0)[0]
    found = grammar(guided_json=SCHEMA)
    ours = Grammars(folder / "tokenizer.json", [end])
    if not tokenizer.spells_bytes:
        if kind == "gpt2_prefixed":  # the library takes it, and goes astray at the first token
            return
        with pytest.raises(ValueError, match="decoder type"):
            ours.allowed(found, np.array([], np.uint32), tokenizer.vocab_size)
        return
    for seed in range(3):
        random, written = np.random.default_rng(seed), []
        while (
            token := draw(random, ours.allowed(found, np.array(written, np.uint32), tokenizer.vocab_size), end)
        ) != end:
            written.append(token)
        prompt = tokenizer.encode("x =")
        shown = tokenizer.detokenizer(prompt)
        text = "".join(map(shown.push, written)) + shown.flush()
        jsonschema.validate(json.loads(text), SCHEMA)


def draw(random: np.random.Generator, mask: np.ndarray, end: int) -> int:
    """The end as soon as there is one."""
    return end if mask[end] else int(random.choice(np.flatnonzero(mask)))


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {
        "type": "function",
        "function": {
            "name": "say",
            "parameters": {
                "$defs": {"x": {"enum": ["ä", "b"]}},
                "type": "object",
                "properties": {"x": {"$ref": "#/$defs/x"}},
                "required": ["x"],
            },
        },
    },
    {"type": "function", "function": {"name": "any"}},
]
F, SAY = '{"name": "f", "arguments": {"a": 5}}', '{"name": "say", "arguments": {"x": "ä"}}'


@pytest.mark.parametrize(
    ("more", "good", "bad"),
    [
        ({"tool_choice": "required"}, [f"[{F}]", f"[{F}, {SAY}]", '[{"name": "any", "arguments": {"b": []}}]'], ["[]"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [f"[{SAY}]"], [f"[{F}, {SAY}]"]),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, [f"[{F}]"], [f"[{SAY}]", f"[{F}, {F}]"]),
    ],
)
def test_tools_that_have_to_be_called(more: Any, good: list[str], bad: list[str]) -> None:
    found = grammar(tools=TOOLS, **more)
    assert [follows(found, text) for text in good] == [True] * len(good)
    assert not any(accepts(found, text) for text in bad)
    assert grammar(tools=TOOLS) == ""


def accepts(found: str, text: str) -> bool:
    try:
        return follows(found, text)
    except RequestError:  # a token that may not be there
        return False
