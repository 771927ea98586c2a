"""Tool calls and reasoning over real sockets, with the official client and a scripted engine that says them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from elastic.protocol import Submit
from elastic.serve.options import ApiOptions
from membership.base.enums import ReasoningParser
from tests.support.gateway_cluster import MODEL, GatewayCluster, RunningGateway
from tests.support.scripted_engine import ScriptedEngine
from tests.support.wild_templates import TEMPLATES

pytestmark = pytest.mark.integration

WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO_CALLS = f"<think>\nBoth.\n</think>\n\nI look.\n{CALL}\n{CALL}"
PLAIN = "It is 21 °C, <tool_call> or so."
ANSWERS = {"one": CALL, "two": TWO_CALLS, "21": PLAIN}


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> GatewayCluster:
    marks = ("<tool_call>", "</tool_call>", "<think>")
    path = tmp_path_factory.mktemp("tools")
    cluster = GatewayCluster(path, 4096, chat_template=TEMPLATES["qwen_tool_calls"], specials=marks)
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
    with pytest.raises(openai.BadRequestError, match="tool_choice: required is not supported"):
        client.chat.completions.create(model=MODEL, messages=user("one"), tools=[WEATHER], tool_choice="required")
