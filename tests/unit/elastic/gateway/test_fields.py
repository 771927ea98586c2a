"""Which fields of a request change nothing, which are honoured, and which are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from structlog.testing import capture_logs

from docs.api import API_PAGE, api_page
from docs.other_servers import SGLANG_FIELDS, VLLM_FIELDS
from elastic.gateway.fields import EXTRAS, Extra, NotedOnce, Place
from elastic.gateway.responses_schema import ResponsesRequest, Text, Thinking
from elastic.gateway.schema import (
    ChatRequest,
    CommonRequest,
    CompletionRequest,
    Message,
    StreamOptions,
    StructuredOutputs,
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
    Place.RESPONSES: (ResponsesRequest,),
    Place.STRUCTURED: (StructuredOutputs,),
    Place.TEXT: (Text,),
    Place.REASONING: (Thinking,),
}


def completion(note: Any = None, **fields: Any) -> CompletionRequest:
    body = json.dumps({"model": "m", "prompt": "x", **fields}).encode()
    return parse(body, CompletionRequest, note) if note else parse(body, CompletionRequest)


def chat(**fields: Any) -> ChatRequest:
    return parse(
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}).encode(), ChatRequest
    )


def response(**fields: Any) -> ResponsesRequest:
    return parse(json.dumps({"model": "m", "input": "x", **fields}).encode(), ResponsesRequest)


def with_extra(extra: Extra, value: Any) -> CommonRequest | ResponsesRequest:
    """A request that says `value` in the extra's place."""
    said = {extra.name: value}
    if extra.place is Place.RESPONSES:
        return response(**said)
    if extra.place in (Place.TEXT, Place.REASONING):
        return response(**{extra.place: said})
    if extra.place is Place.STRUCTURED:
        return chat(structured_outputs={"regex": "a"} | said)
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


def known(place: str) -> set[str]:
    """The names of the fields that we take, ignore or refuse there."""
    apis = {"completions": (Place.REQUEST, CompletionRequest), "chat": (Place.REQUEST, ChatRequest)}
    at, shape = apis.get(place) or (Place(place), SHAPES[Place(place)][0])
    fields = {field.alias or name for name, field in shape.model_fields.items()}
    return fields | {extra.name for extra in EXTRAS if extra.place is at}


@pytest.mark.parametrize("fields", [VLLM_FIELDS, SGLANG_FIELDS], ids=["vllm", "sglang"])
def test_each_field_of_the_other_servers_is_known(fields: dict[str, frozenset[str]]) -> None:
    assert {place: sorted(names - known(place)) for place, names in fields.items()} == {place: [] for place in fields}


def test_each_field_of_openais_client_is_known() -> None:
    """Of the release that is installed. It sends nothing else, unless it is told to (`extra_body`)."""
    asked = {
        "completions": completion_create_params.CompletionCreateParamsBase,
        "chat": chat_create_params.CompletionCreateParamsBase,
        "responses": response_create_params.ResponseCreateParamsBase,
    }
    of_transport = {"stream"}
    unknown = {api: sorted(set(params.__annotations__) - known(api) - of_transport) for api, params in asked.items()}
    assert unknown == {api: [] for api in asked}


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


def test_the_history_of_an_agent_that_called_tools() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call | {"index": 0}], "reasoning": "hm"}
    asked = chat(messages=[said, {"role": "tool", "tool_call_id": "c", "content": "1"}])
    assert [message.plain() for message in asked.messages] == [
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "hm", "thinking": "hm"},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    for nothing in ({"role": "user"}, {"role": "assistant", "tool_calls": []}, {"role": "tool", "tool_calls": [call]}):
        with pytest.raises(RequestError, match=r"content is required|tool_calls are the assistant's"):
            chat(messages=[nothing])


def test_tools_reach_the_template_as_they_were_written() -> None:
    tool = {"function": {"description": "d", "name": "f", "strict": True, "x": None}, "type": "function", "y": [1]}
    asked = chat(tools=[tool], reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    assert asked.variables == {"tools": [tool], "reasoning_effort": "low", "enable_thinking": False}
    assert list(asked.variables["tools"][0]["function"]) == list(tool["function"])
    assert chat(tools=[tool], tool_choice="none", reasoning_effort="none").variables == {}
    with pytest.raises(RequestError, match=r"tools\.0\.function\.name is required"):
        chat(tools=[{"type": "function", "function": {}}])
    for name in ("messages", "tools", "chat_template"):
        with pytest.raises(RequestError, match=f"chat_template_kwargs: {name} is not supported"):
            _ = chat(chat_template_kwargs={name: "x"}).variables


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_tool_that_has_to_be_called_must_be_there(choice: Any) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    forced = [tool.function.name for tool in chat(tools=tools, tool_choice=choice).forced_tools]
    assert forced == (["f", "g"] if choice == "required" else ["f"])
    assert chat(tools=tools, tool_choice="auto").forced_tools == []
    for wrong in ("always", {"type": "function", "function": {"name": "h"}}, {"type": "custom"}):
        with pytest.raises(RequestError, match="tool_choice is none, auto, required, or a function of tools"):
            chat(tools=tools, tool_choice=wrong)
    with pytest.raises(RequestError, match="tool_choice needs tools"):
        chat(tool_choice=choice)


def test_the_items_of_a_response_are_messages() -> None:
    """What an assistant thought, said and called in a row is one of them."""
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "weather"}, {"type": "input_text", "text": "?"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I ", "annotations": []}]},
        {"type": "function_call", "id": "fc", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "d", "name": "g", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": "21"},
        {"type": "function_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "22"}]},
        {"role": "assistant", "content": "done"},
    ]
    chat = response(input=items, instructions="be brief").as_chat(lambda name: None)
    calls = [
        {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}
        for name, function, arguments in (("c", "f", "{}"), ("d", "g", '{"a": 1}'))
    ]
    assert [message.plain() for message in chat.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "I ", "thinking": "hm", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "21"},
        {"role": "tool", "tool_call_id": "d", "content": "22"},
        {"role": "assistant", "content": "done"},
    ]
    for wrong in ({"type": "item_reference", "id": "x"}, {"role": "user", "content": [{"type": "input_image"}]}):
        with pytest.raises(RequestError, match=r"input\.0: .*not supported"):
            response(input=[wrong]).as_chat(lambda name: None)


@pytest.mark.parametrize("kind", [3, True, [], {}, None])
def test_a_part_whose_type_is_no_name_is_refused(kind: Any) -> None:
    with pytest.raises(RequestError, match=r"^input\.0: its content must be a string or a list of text parts"):
        response(input=[{"role": "user", "content": [{"type": kind, "text": "x"}]}]).as_chat(print)


def test_a_response_is_sampled_as_a_chat() -> None:
    said = {
        "top_k": 4, "min_p": 0.1, "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.2,
        "logit_bias": {"7": -1.0}, "structured_outputs": {"json": {"type": "object"}}, "seed": 3, "stop": ["x"],
        "stop_token_ids": [5], "include_stop_str_in_output": True, "ignore_eos": True, "temperature": 0.5, "top_p": 0.9,
        "include_reasoning": False,
    }  # fmt: skip
    assert response(**said).as_chat(print) == chat(messages=[{"role": "user", "content": "x"}], **said, tools=[])
    assert not response().as_chat(print).model_fields_set & set(said) - {"include_reasoning"}


def test_a_response_s_fields_are_those_of_a_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tool = {"type": "function", "name": "f", "parameters": schema, "strict": True}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    chat = response(
        tools=[tool], tool_choice="auto", text={"format": form, "verbosity": "low"}, reasoning={"effort": "low"},
        max_output_tokens=7, temperature=0, seed=3, stream=True, store=False, chat_template_kwargs={"x": 1},
    ).as_chat(lambda name: None)  # fmt: skip
    function = {"name": "f", "parameters": schema, "strict": True}
    wanted = {"tools": [{"type": "function", "function": function}], "reasoning_effort": "low", "x": 1}
    assert chat.variables == wanted
    assert (chat.token_limit, chat.temperature, chat.seed, chat.stream) == (7, 0, 3, True)
    assert chat.response_format is not None
    assert chat.response_format.json_schema is not None
    assert chat.response_format.json_schema.schema_ == schema
    assert "top_p" not in chat.model_fields_set  # so that the checkpoint's counts


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


NO_TEXT = [{"role": "user", "content": 3}]


@pytest.mark.parametrize(
    ("ask", "given", "field"),
    [
        (response, {"input": []}, "input"), (response, {"input": 3}, "input"), (response, {"input": ["x"]}, "input"),
        (response, {"tool_choice": 3}, "tool_choice"), (chat, {"tool_choice": []}, "tool_choice"),
        (chat, {"guided_json": 3}, "guided_json"), (completion, {"prompt": 3}, "prompt"),
        (chat, {"messages": NO_TEXT}, "messages.0.content"),
        (chat, {"structured_outputs": {"json": 3}}, "structured_outputs.json"),
    ],
)  # fmt: skip
def test_a_field_of_several_types_is_refused_in_one_line(ask: Any, given: dict[str, Any], field: str) -> None:
    """It names the field and what it may be, and nothing of how that is checked."""
    with pytest.raises(RequestError, match=rf"^{field} must be an? ") as refused:
        ask(**given)
    assert refused.value.param == field


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio", "input_audio": {"data": "A"}},
        {"type": "file", "file": {"file_id": "x"}}, {"type": "input_image", "image_url": "x"},
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_its_name(part: dict[str, Any]) -> None:
    content = [{"type": "text", "text": "What is it?"}, part]
    said = f"a part of type '{part['type']}' is not supported: this serves text models"
    with pytest.raises(RequestError, match=rf"^messages\.1\.content: {said}") as refused:
        chat(messages=[{"role": "user", "content": "x"}, {"role": "user", "content": content}])
    assert (refused.value.param, refused.value.code) == ("messages.1.content", "unsupported_value")
    with pytest.raises(RequestError, match=rf"^input\.0: {said}"):
        response(input=[{"role": "user", "content": content}]).as_chat(print)


@pytest.mark.parametrize(
    "items",
    [[{"role": "nobody", "content": "x"}], [{"role": "user"}], [{"type": "function_call", "call_id": "x"}], [{}]],
)
def test_what_an_item_lacks_is_the_inputs_fault(items: Any) -> None:
    """Not that of `messages`, which the client did not send."""
    with pytest.raises(RequestError, match=r"^input") as refused:
        response(input=items).as_chat(print)
    assert refused.value.param == "input"
