"""Tool calls, reasoning and /v1/responses over real sockets, with the official client and a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import FunctionToolParam, Response, ResponseStreamEvent
from pydantic import TypeAdapter

from elastic.protocol import Submit
from elastic.serve.options import ApiOptions
from membership.base.enums import ReasoningParser
from tests.support.gateway_cluster import MODEL, GatewayCluster, RunningGateway, wait_ready
from tests.support.scripted_engine import ScriptedEngine
from tests.support.wild_templates import TEMPLATES

pytestmark = pytest.mark.integration

WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO_CALLS = f"<think>\nBoth.\n</think>\n\nI look.\n{CALL}\n{CALL}"
PLAIN = "It is 21 °C, <tool_call> or so."
FLAT: FunctionToolParam = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ANSWERS = {"forced": '[{"name": "weather", "arguments": {}}]', "one": CALL, "two": TWO_CALLS, "21": PLAIN}


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> GatewayCluster:
    marks = ("<tool_call>", "</tool_call>", "<think>")
    path = tmp_path_factory.mktemp("tools")
    cluster = GatewayCluster(path, 4096, chat_template=TEMPLATES["qwen_tool_calls"], specials=marks, end_tokens=(1,))
    cluster.publish_view()
    return cluster


@pytest.fixture(scope="module")
def engine(cluster: GatewayCluster) -> Iterator[ScriptedEngine]:
    def answer(submit: Submit) -> list[int]:
        asked = cluster.tokenizer.decode_all(submit.prompt)
        return cluster.tokenizer.encode(next(ANSWERS[each] for each in reversed(ANSWERS) if each in asked))[1:]

    with cluster.engine(answer) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(cluster: GatewayCluster, engine: ScriptedEngine) -> Iterator[RunningGateway]:
    with cluster.gateway(api=ApiOptions(reasoning_parser=ReasoningParser.QWEN3)) as running:
        wait_ready(running)  # its sockets to the engine are no test's
        yield running


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[OpenAI]:
    with gateway.client() as client:
        yield client


def test_an_agent_calls_a_tool_and_sends_its_result(
    client: OpenAI, cluster: GatewayCluster, engine: ScriptedEngine
) -> None:
    messages = user("one")
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices[0]
    assert (first.finish_reason, first.message.content) == ("tool_calls", None)
    assert first.message.tool_calls is not None
    (call,) = first.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Köln"}')
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in cluster.tokenizer.decode_all(engine.submits[-1].prompt)
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "21 °C"}]
    last = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices[0]
    assert (last.finish_reason, last.message.content, last.message.tool_calls) == ("stop", PLAIN, None)
    prompt = cluster.tokenizer.decode_all(engine.submits[-1].prompt)
    assert prompt.endswith(
        f"<|im_start|>assistant\n{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\n21 °C\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_calls_and_reasoning_are_streamed(client: OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=user("two"), tools=[WEATHER], stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(getattr(chunk.delta, "reasoning_content", None) or "" for chunk in chunks) == "Both."
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "I look.\n"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
    deltas = [each for chunk in chunks for each in chunk.delta.tool_calls or ()]
    for index in (0, 1):
        first, *more = [each for each in deltas if each.index == index]
        assert (first.type, first.function.name, len(first.id)) == ("function", "weather", 9)
        assert all(each.id is each.type is each.function.name is None for each in more)
        assert len(more) > 3
        assert "".join(each.function.arguments for each in (first, *more)) == '{"city": "Köln"}'
    assert [each.index for each in deltas] == sorted(each.index for each in deltas)


def test_reasoning_of_a_whole_answer(client: OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model=MODEL, messages=user("two"), extra_body=more).choices[0].message

    message = ask()
    assert message.reasoning_content == "Both."
    assert message.content.startswith('I look.\n\n{"name": "weather"')  # without tools, special tokens are hidden
    assert message.tool_calls is None
    assert not hasattr(ask(include_reasoning=False), "reasoning_content")
    kept = ask(separate_reasoning=False)
    assert "Both.\n</think>" in kept.content


def test_one_call_where_there_may_not_be_several(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user("two"), tools=[WEATHER], parallel_tool_calls=False, n=2
    )
    calls = [call for choice in answer.choices for call in choice.message.tool_calls or ()]
    assert len(calls) == 2
    assert calls[0].id != calls[1].id


def test_a_call_that_is_cut_off_says_so(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=user("one"), tools=[WEATHER])
    assert whole.usage is not None
    limit = whole.usage.completion_tokens - 8
    cut = client.chat.completions.create(model=MODEL, messages=user("one"), tools=[WEATHER], max_tokens=limit)
    assert cut.choices[0].finish_reason == "length"
    assert cut.choices[0].message.tool_calls is not None
    assert '{"city": "Köln"}'.startswith(cut.choices[0].message.tool_calls[0].function.arguments.rstrip("\ufffd"))


def test_tools_that_are_not_to_be_called(client: OpenAI, cluster: GatewayCluster, engine: ScriptedEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("one"), tools=[WEATHER], tool_choice="none")
    assert "name" in (answer.choices[0].message.content or "")
    assert answer.choices[0].message.tool_calls is None
    assert "<tools>" not in cluster.tokenizer.decode_all(engine.submits[-1].prompt)


def test_a_tool_that_has_to_be_called(client: OpenAI, engine: ScriptedEngine) -> None:
    """The answer is under a grammar; the ranks follow it."""
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(
            model=MODEL, messages=user("forced"), tools=[WEATHER], tool_choice=choice
        ).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        assert [call.function.name for call in answer.message.tool_calls or ()] == ["weather"]
        shaping = engine.submits[-1].sampling.shaping
        assert shaping is not None
        assert shaping.grammar
    alone = engine.submits[-1].sampling.shaping
    also: Any = {"type": "json_object"}  # agents send it beside their tools: it is about texts
    client.chat.completions.create(
        model=MODEL, messages=user("forced"), tools=[WEATHER], tool_choice=named, response_format=also
    )
    assert engine.submits[-1].sampling.shaping == alone
    with pytest.raises(openai.BadRequestError, match="only one of guided_json, tool_choice"):
        client.chat.completions.create(
            model=MODEL, messages=user("forced"), tools=[WEATHER], tool_choice="required",
            extra_body={"guided_json": {}},
        )  # fmt: skip


def test_a_response_calls_a_tool_and_its_output_is_sent(
    client: OpenAI, cluster: GatewayCluster, engine: ScriptedEngine
) -> None:
    items: Any = [{"role": "user", "content": "one"}]
    first = client.responses.create(model=MODEL, input=items, tools=[FLAT], instructions="be brief", store=False)
    (call,) = first.output
    assert call.type == "function_call"
    assert (call.name, call.arguments, first.status, first.store) == ("weather", '{"city": "Köln"}', "completed", False)
    assert first.usage is not None
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    items += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "21 °C"}]
    last = client.responses.create(model=MODEL, input=items, tools=[FLAT])
    assert last.output_text == PLAIN
    prompt = cluster.tokenizer.decode_all(engine.submits[-1].prompt)
    assert f"{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\n21 °C\n</tool_response>" in prompt
    assert first.id != last.id


def test_a_response_is_streamed_as_typed_events(client: OpenAI, gateway: RunningGateway) -> None:
    """As the client puts them together, and as it describes them."""
    with client.responses.stream(model=MODEL, input="two", tools=[FLAT]) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output_text == "I look.\n"
    assert [item.arguments for item in response.output if item.type == "function_call"] == ['{"city": "Köln"}'] * 2
    for started, ended in (("output_item.added", "output_item.done"), ("content_part.added", "content_part.done")):
        assert kinds.count(f"response.{started}") == kinds.count(f"response.{ended}") > 0
    body = {"model": MODEL, "input": "two", "tools": [FLAT], "stream": True}
    raw = httpx.post(f"{gateway.url}/v1/responses", json=body, timeout=20).text
    blocks = [block.split("\n") for block in raw.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert (
        [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in events] == kinds_of(events)
    )
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    whole = httpx.post(f"{gateway.url}/v1/responses", json=body | {"stream": False}, timeout=20).json()
    Response.model_validate(whole)
    streamed = events[-1]["response"]
    for each in (whole, streamed):
        for item in each["output"]:
            assert item.pop("id").startswith(("rs_", "msg_", "fc_"))
            item.pop("call_id", None)
    assert whole["output"] == streamed["output"]
    assert whole["usage"] == streamed["usage"]


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    """Their types; a ValidationError if one is not as the client describes it."""
    return [str(EVENTS.validate_python(event).type) for event in events]


def test_a_response_that_is_cut_off_is_incomplete(client: OpenAI) -> None:
    short = client.responses.create(model=MODEL, input="21", max_output_tokens=3)
    assert (short.status, short.incomplete_details and short.incomplete_details.reason) == (
        "incomplete", "max_output_tokens",
    )  # fmt: skip
    assert PLAIN.startswith(short.output_text)
    events = list(client.responses.create(model=MODEL, input="21", max_output_tokens=3, stream=True))
    assert events[-1].type == "response.incomplete"


def test_what_a_response_cannot_be_is_refused_by_name(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id is not supported"):
        client.responses.create(model=MODEL, input="x", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.responses.create(model="other", input="x")
    with pytest.raises(openai.BadRequestError, match=r"tools\.0\.type"):
        client.responses.create(model=MODEL, input="x", tools=[{"type": "web_search"}])
