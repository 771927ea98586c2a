"""What form an answer must have, as the grammar that ranks follow: JSON, a regular expression, one of several texts.

OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from elastic.gateway.schema import CommonRequest
from membership.base.errors import RequestError

MAX_CHARS = 64 * 1024
# Models indent; without a limit a bad one may write nothing but spaces.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,24}"}
ANY_OBJECT = {"type": "object"}


class Kind(StrEnum):
    """How a form is described."""

    JSON = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


class Form(NamedTuple):
    """A form that was asked for, and by which field."""

    param: str
    kind: Kind
    value: Any


def form_of(asked: CommonRequest) -> Form | None:
    """The form that the answer must have. RequestError if there are several, or if it leaves its end to others."""
    forms = [*_openai(asked), *_vllm(asked), *_guided(asked)]
    if not forms:
        return None
    form = forms[0]
    if len(forms) > 1:
        raise RequestError(f"only one of {', '.join(form.param for form in forms)} can be followed", param=form.param)
    if asked.ignore_eos or asked.min_tokens:
        name = "ignore_eos" if asked.ignore_eos else "min_tokens"
        raise RequestError(f"{form.param} says where the answer ends: {name} does not go with it", param=name)
    if len(json.dumps(form.value)) > MAX_CHARS:
        raise RequestError(f"{form.param} is longer than {MAX_CHARS} characters", param=form.param)
    return form


def _openai(asked: CommonRequest) -> list[Form]:
    form = asked.response_format
    if form is None or form.type == "text":
        return []
    if form.type == "json_object":
        return [Form("response_format", Kind.JSON, ANY_OBJECT)]
    if form.json_schema is None:
        raise RequestError("response_format.json_schema is required", param="response_format")
    schema = form.json_schema.schema_
    return [Form("response_format", Kind.JSON, ANY_OBJECT if schema is None else schema)]


def _vllm(asked: CommonRequest) -> list[Form]:
    wanted = asked.structured_outputs
    if wanted is None:
        return []
    values = [wanted.schema_, wanted.regex, wanted.choice, wanted.grammar]
    values[0] = ANY_OBJECT if wanted.json_object and values[0] is None else values[0]
    return [Form("structured_outputs", kind, each) for kind, each in zip(Kind, values, strict=True) if each is not None]


def _guided(asked: CommonRequest) -> list[Form]:
    values = ((kind, getattr(asked, f"guided_{kind}")) for kind in Kind)
    return [Form(f"guided_{kind}", kind, value) for kind, value in values if value is not None]


def grammar_of(form: Form, tokenizer_file: Path, ends: Sequence[int]) -> str:
    """The grammar. Takes a while. RequestError if it cannot be followed, or not with this model's tokenizer."""
    from llguidance import LLMatcher  # few gateways ever need it

    param, kind, value = form
    try:
        if kind is Kind.JSON:
            grammar = LLMatcher.grammar_from_json_schema(value, overrides=JSON_OPTIONS)
        elif kind is Kind.REGEX:
            grammar = LLMatcher.grammar_from_regex(value)
        elif kind is Kind.CHOICE:
            texts = " | ".join(json.dumps(each, ensure_ascii=False) for each in value)
            grammar = LLMatcher.grammar_from_lark(f"start: {texts}")
        else:
            grammar = LLMatcher.grammar_from_lark(value)
        problem = LLMatcher.validate_grammar(grammar)
    except ValueError as error:
        problem = str(error)
    if problem:
        message = f"{param} cannot be followed: {' '.join(problem.split())[:300]}"
        raise RequestError(message, param=param, code="invalid_value")
    if trouble := _trouble(tokenizer_file, tuple(ends)):
        raise RequestError(f"{param} is not supported with this model: {trouble}", param=param, status=501)
    return str(grammar)


@cache
def _trouble(tokenizer_file: Path, ends: tuple[int, ...]) -> str:
    """Why no grammar can be followed with this tokenizer, if so."""
    from llguidance import LLTokenizer

    if not ends:
        return "it has no end token"
    try:
        LLTokenizer(str(tokenizer_file), eos_token=list(ends))
    except ValueError as error:
        return str(error)[:200]
    return ""
