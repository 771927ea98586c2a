"""What form an answer must have, as the grammar that ranks follow: JSON, a regular expression, one of several texts.

OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import cache, lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from elastic.gateway.schema import ChatRequest, CommonRequest
from membership.base.errors import RequestError
from workers.model.grammar import mask_of, matcher_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CHARS = 24 * 1024  # the library takes quadratic time: the largest schemas half a second
KEPT = 32
MAX_LOOKS = 200  # for the place of an error in a schema
MAX_FORCED = 1000  # bytes of a text that a short form leaves no choice of: the library takes up to 0.5 ms for each
TOO_LONG = "too_long"
REPEATED = re.compile(r"\{\d|min(Length|Items|Properties)")  # how a short form describes a long text
# Models indent; without a limit a bad one may write nothing but spaces.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,24}", "lenient": False}
ANY_OBJECT = {"type": "object"}
DEFINITIONS = ("$defs", "definitions")
NAMED_SCHEMAS = ("properties", "patternProperties")  # keywords that hold schemas by name,
LISTED_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")  # in a list,
ONE_SCHEMA = ("items", "additionalProperties", "contains")  # or one


class Kind(StrEnum):
    """How a form is described."""

    JSON = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


class Form(NamedTuple):
    """A form that was asked for, and by which field. `value` is JSON."""

    param: str
    kind: Kind
    value: str


class Forms:
    """Finds the grammars of the forms that clients ask for. `spelled`: whether the tokenizer's tokens are bytes."""

    def __init__(self, spelled: bool, ends: Sequence[int]) -> None:
        self._spelled, self._ends = spelled, ends
        self._turn = asyncio.Lock()  # one at a time, beside the event loop: other threads are for other requests

    async def grammar(self, asked: CommonRequest) -> str:
        """The grammar of the answer; empty: any text. RequestError says what cannot be followed, and where it is."""
        form = form_of(asked)
        if form is None:
            return ""
        if not (self._spelled and self._ends):
            why = "its tokenizer's tokens are no bytes of the text" if self._ends else "it has no end token"
            raise RequestError(f"{form.param} is not supported with this model: {why}", param=form.param, status=501)
        async with self._turn:
            return await asyncio.to_thread(grammar_of, form)


def form_of(asked: CommonRequest) -> Form | None:
    """The form that the answer must have. RequestError if there are several, or if it could not end where that ends."""
    calls = [*_tool_choice(asked)]
    text = [] if calls else [*_openai(asked)]  # it is about texts, and a call that has to be made is none
    forms = [*text, *_vllm(asked), *_guided(asked), *calls]
    if not forms:
        return None
    form = forms[0]
    if len(forms) > 1:
        raise RequestError(f"only one of {', '.join(form.param for form in forms)} can be followed", param=form.param)
    if asked.ignore_eos:
        message = f"{form.param} says where the answer ends: ignore_eos does not go with it"
        raise RequestError(message, param="ignore_eos")
    if len(form.value) > MAX_CHARS:
        raise RequestError(f"{form.param} is longer than {MAX_CHARS} characters", param=form.param)
    return form


def _form(param: str, kind: Kind, value: Any) -> Form:
    return Form(param, kind, json.dumps(value))


def _openai(asked: CommonRequest) -> Iterator[Form]:
    form = asked.response_format
    if form is None or form.type == "text":
        return
    schema: dict[str, Any] | None = ANY_OBJECT
    if form.type == "json_schema":
        if form.json_schema is None:
            raise RequestError("response_format.json_schema is required", param="response_format")
        schema = form.json_schema.schema_
    yield _form("response_format", Kind.JSON, ANY_OBJECT if schema is None else schema)


def _vllm(asked: CommonRequest) -> Iterator[Form]:
    wanted = asked.structured_outputs
    if wanted is None:
        return
    schema = ANY_OBJECT if wanted.json_object and wanted.schema_ is None else wanted.schema_
    values = (schema, wanted.regex, wanted.choice, wanted.grammar)
    for kind, value in zip(Kind, values, strict=True):
        if value is not None:
            yield _form(f"structured_outputs.{kind}", kind, value)


def _guided(asked: CommonRequest) -> Iterator[Form]:
    for kind in Kind:
        value = getattr(asked, f"guided_{kind}")
        if value is not None:
            yield _form(f"guided_{kind}", kind, value)


def _tool_choice(asked: CommonRequest) -> Iterator[Form]:
    """A list of calls. Each tool's schema stays a document of its own, since its references are to its own parts."""
    if not isinstance(asked, ChatRequest) or not (tools := asked.forced_tools):
        return
    calls, rules = [], []
    for number, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.function.name)}, "arguments": ', ensure_ascii=False)
        schema = tool.function.parameters or ANY_OBJECT
        calls.append(f'{head} arguments{number} "}}"')
        rules.append(f"arguments{number}: %json {json.dumps(schema | {'x-guidance': JSON_OPTIONS})}")
    more = "" if asked.most_calls else ' (", " call)*'
    grammar = "\n".join((f'start: "[" call{more} "]"', f"call: {' | '.join(calls)}", *rules))
    yield _form("tool_choice", Kind.GRAMMAR, grammar)


@lru_cache(KEPT)
def grammar_of(form: Form) -> str:
    """The grammar. Takes up to a second. RequestError if it cannot be followed: how, and where in a schema."""
    param, kind, text = form
    value = json.loads(text)
    if kind is Kind.JSON and isinstance(value, str):
        value = _parsed(param, value)
    try:
        return _checked(kind, value)
    except RequestError as error:
        looked_for = kind is Kind.JSON and error.code != TOO_LONG  # which takes a second each time
        where = f" at {place}" if looked_for and (place := _place(value, str(error))) else ""
        reason = str(error).removeprefix("the grammar cannot be followed: ")
        raise RequestError(f"{param} cannot be followed{where}: {reason}", param=param, code="invalid_value") from None


def _parsed(param: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{param} is not valid JSON: {error}", param=param, code="invalid_value") from None
    if not isinstance(value, dict):
        raise RequestError(f"{param} is not a JSON object", param=param, code="invalid_value")
    return value


def _checked(kind: Kind, value: Any) -> str:
    """The grammar, which has been compiled, and begins some text."""
    from llguidance import LLMatcher  # few gateways ever need it

    try:
        if kind is Kind.JSON:
            grammar = LLMatcher.grammar_from_json_schema(value, overrides=JSON_OPTIONS)
        elif kind is Kind.GRAMMAR:
            grammar = LLMatcher.grammar_from_lark(value)
        else:
            grammar = LLMatcher.grammar_from_regex(value if kind is Kind.REGEX else "|".join(map(_literal, value)))
    except ValueError as error:
        raise RequestError(str(error)) from None
    matcher = matcher_of(_byte_tokenizer(), grammar)
    if ignored := matcher.get_grammar_warnings():
        raise RequestError("; ".join(ignored)[:300])
    if REPEATED.search(json.dumps(value)) and _forced(matcher.deep_copy()) > MAX_FORCED:
        message = f"the text begins with more than {MAX_FORCED} characters that are the only ones possible"
        raise RequestError(message, code=TOO_LONG)
    mask_of(matcher)
    return str(grammar)


def _forced(matcher: LLMatcher) -> int:
    """With how many bytes each text begins; not counted beyond the limit. What the library would otherwise follow to
    its end before the first token: 20 s for `a{1000000}`, here and in a step of a rank, which all requests share.
    """
    for count in range(MAX_FORCED + 1):
        possible = list(islice((byte for byte in range(256) if matcher.validate_tokens([byte])), 2))
        if len(possible) != 1 or matcher.is_accepting():
            return count
        matcher.try_consume_tokens(possible)
    return MAX_FORCED + 1


def _literal(text: str) -> str:
    """A regular expression of this text."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):X}}}" for char in text)


def _place(schema: dict[str, Any], error: str) -> str:
    """The innermost schema with the same error, as a JSON pointer; empty if it is the whole."""
    path, looks = "", 0
    shared = {name: schema[name] for name in DEFINITIONS if name in schema}
    inner: Any = schema
    while True:
        for step, each in _inside(inner):
            looks += 1
            if looks > MAX_LOOKS:
                return path
            try:
                _checked(Kind.JSON, each | shared)
            except RequestError as found:
                if str(found) == error:
                    inner, path = each, f"{path}/{step}"
                    break
        else:
            return path


def _inside(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for keyword in (*NAMED_SCHEMAS, *LISTED_SCHEMAS, *ONE_SCHEMA):
        value = schema.get(keyword)
        if isinstance(value, dict) and keyword in NAMED_SCHEMAS:
            found = [(f"{keyword}/{name}", each) for name, each in value.items()]
        elif isinstance(value, list) and keyword in LISTED_SCHEMAS:
            found = [(f"{keyword}/{number}", each) for number, each in enumerate(value)]
        else:
            found = [(keyword, value)] if keyword in ONE_SCHEMA else []
        yield from ((step, each) for step, each in found if isinstance(each, dict))


class _Bytes:
    """A tokenizer of which each token is a byte: whether a grammar can be followed does not hang on the model's."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def _byte_tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])
