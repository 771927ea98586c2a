"""Which fields of a request change nothing, which are honoured, and which are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from docs.api import API_PAGE, api_page
from elastic.gateway.fields import EXTRAS, Extra, NotedOnce, Place
from elastic.gateway.schema import (
    ChatRequest,
    CommonRequest,
    CompletionRequest,
    Message,
    StreamOptions,
    TextPart,
    parse,
)
from membership.base.errors import RequestError

pytestmark = pytest.mark.unit

SHAPES = {
    Place.REQUEST: (CompletionRequest, ChatRequest),
    Place.STREAM_OPTIONS: (StreamOptions,),
    Place.MESSAGE: (Message,),
    Place.PART: (TextPart,),
}


def completion(note: Any = None, **fields: Any) -> CompletionRequest:
    body = json.dumps({"model": "m", "prompt": "x", **fields}).encode()
    return parse(body, CompletionRequest, note) if note else parse(body, CompletionRequest)


def chat(**fields: Any) -> ChatRequest:
    return parse(
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}).encode(), ChatRequest
    )


def with_extra(extra: Extra, value: Any) -> CommonRequest:
    """A request that says `value` in the extra's place."""
    said = {extra.name: value}
    if extra.place is Place.STREAM_OPTIONS:
        return chat(stream=True, stream_options=said)
    if extra.place is Place.MESSAGE:
        return chat(messages=[{"role": "assistant", "content": "x"} | said])
    if extra.place is Place.PART:
        return chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"} | said]}])
    offered_by_chat = extra.name in ChatRequest.model_fields
    return completion(**said) if offered_by_chat else chat(**said)


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: f"{extra.place}.{extra.name}")
def test_each_field_of_the_table(extra: Extra) -> None:
    """What asks for nothing gives the request without it; what asks for something is refused by name, with a hint."""
    without = with_extra(extra, None)
    for value in ("something", {"a": 1}, 7) if extra.off is None else extra.off:
        assert with_extra(extra, value) == without
    if extra.off is not None:
        with pytest.raises(RequestError, match=f"{extra.name} is not supported") as refusal:
            with_extra(extra, "something")
        assert (refusal.value.param, refusal.value.code) == (extra.name, "unsupported_parameter")
        assert refusal.value.hint


def test_no_field_is_in_the_table_twice_or_for_nothing() -> None:
    places = [(extra.place, extra.name) for extra in EXTRAS]
    assert len(set(places)) == len(places)
    for extra in EXTRAS:
        assert not all(extra.name in shape.model_fields for shape in SHAPES[extra.place]), extra.name


def test_an_ignored_field_is_logged_once() -> None:
    note = NotedOnce()
    with capture_logs() as lines:
        for _ in range(3):
            completion(note, safety_identifier="me", prompt_cache_key="k", echo=None)
    assert lines == [
        {"event": "field_ignored", "field": name, "log_level": "info"}
        for name in ("safety_identifier", "prompt_cache_key")
    ]


def test_a_request_of_guidellm() -> None:
    asked = chat(
        max_completion_tokens=128, stream=True, ignore_eos=True, stop=None,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    assert (asked.token_limit, asked.include_usage, asked.continuous_usage, asked.stop) == (128, True, True, [])


def test_the_history_of_an_agent() -> None:
    """As the openai package dumps an assistant's message."""
    said = {
        "role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None, "function_call": None,
        "tool_calls": [],
    }  # fmt: skip
    parts = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    asked = chat(messages=[said, {"role": "user", "content": parts}], tools=[], tool_choice="auto")
    plain = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}]
    assert [message.plain() for message in asked.messages] == plain


def test_values_as_openai_and_vllm_take_them() -> None:
    asked = completion(top_p=0, stop="", max_tokens=10.0, top_k=-1.0, seed=7.0, n=1.0, logprobs=2.0)
    assert (asked.top_p, asked.stop, asked.max_tokens, asked.top_k, asked.seed) == (0, [], 10, -1, 7)
    assert completion(stop=["", "a"]).stop == ["a"]
    assert chat(top_logprobs=0).wanted_logprobs == -1


@pytest.mark.parametrize("value", [10.5, "10", True, [10]])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="max_tokens"):
        completion(max_tokens=value)


def test_an_unknown_field_is_refused() -> None:
    for asked in (lambda: completion(colour="red"), lambda: chat(stream=True, stream_options={"colour": 1})):
        with pytest.raises(RequestError, match=r"unknown field: .*colour"):
            asked()


def test_the_page_is_written_from_the_tables() -> None:
    text = API_PAGE.read_text(encoding="utf-8")
    assert api_page(text) == text, "run `make docs`"
    for name in ("temperature", "safety_identifier", "tools"):
        assert f"| `{name}` |" in text
