"""Answers taken apart: what each format of tool calls gives, and that it does not depend on how the text is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.gateway.answer.formats import DEEPSEEK, FORMATS, HERMES, LLAMA_JSON, MISTRAL, Format, format_for
from elastic.gateway.answer.reader import Expected, Reader
from elastic.gateway.answer.reasoning import reasons_first
from elastic.gateway.answer.said import NOTHING, Said, gathered
from membership.base.enums import ReasoningParser, ToolCallParser
from tests.support.wild_templates import TEMPLATES

pytestmark = pytest.mark.unit

TOOLS = frozenset({"get_weather", "add"})
PARIS, SUM = {"city": 'Paris "}]é\\', "days": [1, {"a": None}]}, {"a": 1, "b": -2.5}
CALLS = [("get_weather", PARIS), ("add", SUM)]


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def hermes(calls: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {dumps(a)}}}\n</tool_call>' for n, a in calls)


def mistral(calls: Sequence[tuple[str, Any]]) -> str:
    return "[TOOL_CALLS] " + dumps([{"name": n, "arguments": a} for n, a in calls])


def mistral_v11(calls: Sequence[tuple[str, Any]]) -> str:
    return "".join(f"[TOOL_CALLS]{n}[ARGS]{dumps(a)}" for n, a in calls)


def mistral_v11_with_ids(calls: Sequence[tuple[str, Any]]) -> str:
    return "".join(f"[TOOL_CALLS]{n}[CALL_ID]a1b2c3d4e[ARGS]{dumps(a)}" for n, a in calls)


def llama(calls: Sequence[tuple[str, Any]]) -> str:
    return "; ".join(dumps({"name": n, "parameters": a}) for n, a in calls)


def llama_with_tag(calls: Sequence[tuple[str, Any]]) -> str:
    return "<|python_tag|>" + ";".join(dumps({"type": "function", "name": n, "parameters": a}) for n, a in calls)


def deepseek_v3(calls: Sequence[tuple[str, Any]]) -> str:
    each = (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{dumps(a)}\n```<｜tool▁call▁end｜>" for n, a in calls
    )
    return "<｜tool▁calls▁begin｜>" + "\n".join(each) + "<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Sequence[tuple[str, Any]]) -> str:
    each = (f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{dumps(a)}<｜tool▁call▁end｜>" for n, a in calls)
    return "<｜tool▁calls▁begin｜>" + "".join(each) + "<｜tool▁calls▁end｜>"


WRITERS = [
    (HERMES, hermes), (MISTRAL, mistral), (MISTRAL, mistral_v11), (MISTRAL, mistral_v11_with_ids), (LLAMA_JSON, llama),
    (LLAMA_JSON, llama_with_tag), (DEEPSEEK, deepseek_v3), (DEEPSEEK, deepseek_v31),
]  # fmt: skip


def read(pieces: Sequence[str], **expected: Any) -> Said:
    reader = Reader(Expected(**{"tools": TOOLS} | expected), lambda number: f"id{number}")
    return gathered([*map(reader.push, pieces), reader.flush()])


def called(said: Said) -> list[tuple[str, Any]]:
    assert [(call.index, call.id) for call in said.calls] == [(n, f"id{n}") for n in range(len(said.calls))]
    return [(call.name, json.loads(call.arguments)) for call in said.calls]


@pytest.mark.parametrize(("form", "write"), WRITERS, ids=lambda each: getattr(each, "__name__", ""))
def test_calls_of_each_format(form: Format, write: Any) -> None:
    for calls in (CALLS, CALLS[:1], [("add", {})]):
        for before in ("", "Let me look.\n\n")[: 2 if form.marked or "tag" in write.__name__ else 1]:
            text = before + write(calls)
            said = read([text], form=form)
            assert (called(said), said.content) == (calls, before)
            assert read(list(text), form=form) == said


@pytest.mark.parametrize(("form", "write"), WRITERS, ids=lambda each: getattr(each, "__name__", ""))
def test_a_call_is_told_before_its_arguments_and_these_as_they_come(form: Format, write: Any) -> None:
    reader = Reader(Expected(form, TOOLS), lambda number: f"id{number}")
    pieces = [call for char in write(CALLS[:1]) for call in reader.push(char).calls]
    assert (pieces[0].name, pieces[0].id, pieces[0].arguments) == ("get_weather", "id0", "{")
    assert all(not (call.name or call.id) and len(call.arguments) == 1 for call in pieces[1:])
    assert json.loads("".join(call.arguments for call in pieces)) == PARIS
    assert reader.flush() == NOTHING


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[TOOL", "[ARGS]", "[CALL_ID]", "[", "]", ",", ";",
    "{", "}", '"', "\\", "\n", " ", "```", "<|python_tag|>", '{"name": "add", "arguments": ',
    '{"name": "no_tool", "parameters": {"x": 1}}', '{"arguments": {"a": "}"}, "name": "add"}',
    '{"name": "add", "arguments": "{\\"a\\": 1}"}', '{"name": "add"}', '{"a": 1}', '{"name": 1}',
    "add", "text", "é😀", "<think>", "</think>", "<think", "</thi",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function<｜tool▁sep｜>add\n```json\n", "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", *(write(CALLS) for _, write in WRITERS),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)


@st.composite
def cut(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(TEXTS)
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12))) if text else []
    return text, [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(cut(), st.sampled_from([None, HERMES, MISTRAL, LLAMA_JSON, DEEPSEEK]), st.sampled_from([None, True, False]))
def test_pieces_of_any_cut_add_up_to_the_same(
    given_cut: tuple[str, list[str]], form: Format | None, first: bool | None
) -> None:
    text, pieces = given_cut
    for reasoning in (False, True):
        whole = read([text], form=form, reasoning=reasoning, reasons_first=first)
        for cuts in (pieces, list(text)):
            assert read(cuts, form=form, reasoning=reasoning, reasons_first=first) == whole


@given(TEXTS, st.sampled_from([HERMES, MISTRAL, LLAMA_JSON, DEEPSEEK]))
def test_a_text_without_a_call_is_left_as_it_is(text: str, form: Format) -> None:
    said = read([text], form=form)
    if not said.calls:
        assert said.content == text


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>{"name": "add"'),
        (HERMES, '<tool_call>\n{"nome": "add", "arguments": {}}\n</tool_call>'),
        (HERMES, "use <tool_call> and </tool_call>, or <tool_call"),
        (HERMES, '{"name": "add", "arguments": {}}'),
        (MISTRAL, "[TOOL_CALLS] no, [TOOL_CALLS] again"),
        (LLAMA_JSON, ' {"name": "Ada", "parameters": {"born": 1815}}'),
        (LLAMA_JSON, '{"answer": {"name": "add"}}'),
        (LLAMA_JSON, 'As JSON: {"name": "add", "parameters": {}}'),
        (DEEPSEEK, "<｜tool▁calls▁begin｜>function"),
    ],
)
def test_what_is_no_call_is_text(form: Format, text: str) -> None:
    assert read([text], form=form) == Said(text) == read(list(text), form=form)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "add"}', '{"a": 1}'),
        ('{"name": "add"}', "{}"),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"id": 7, "name": "add", "arguments": {"a":  1}}', '{"a": 1}'),
        ('{"name": "add", "arguments": {"a":  1}, "id": {"x": 7}}', '{"a":  1}'),
    ],
)
def test_calls_with_fields_in_another_order(text: str, arguments: str) -> None:
    said = read([f"<tool_call>{text}</tool_call> done"], form=HERMES)
    assert [(call.name, call.arguments) for call in said.calls] == [("add", arguments)]
    assert said.content == " done"


def test_a_call_that_is_cut_off_has_the_arguments_so_far() -> None:
    said = read(['<tool_call>{"name": "add", "arguments": {"a": 1, "b'], form=HERMES)
    assert [(call.name, call.arguments) for call in said.calls] == [("add", '{"a": 1, "b')]
    assert said.content == ""


def test_a_tool_that_is_not_there_is_a_call_only_where_a_mark_says_so() -> None:
    text = '{"name": "other", "arguments": {}}'
    assert read([f"<tool_call>{text}</tool_call>"], form=HERMES).calls[0].name == "other"
    assert read([text], form=LLAMA_JSON) == Said(text)


def test_only_the_first_call_where_there_may_be_one() -> None:
    said = read([hermes(CALLS)], form=HERMES, parallel=False)
    assert called(said) == CALLS[:1]
    assert said.content == ""


@pytest.mark.parametrize(
    ("first", "text", "reasoning", "content"),
    [
        (None, "<think>\na\n\nb\n</think>\n\nc\n", "a\n\nb", "c\n"),
        (None, "plain </think> text", "", "plain </think> text"),
        (None, "\n", "", "\n"),
        (True, "a</think>c", "a", "c"),
        (True, "\n<think>\na\n</think>\n\n", "a", ""),
        (True, "never\nended\n", "never\nended", ""),
        (False, "<think>a</think>c", "", "<think>a</think>c"),
    ],
)
def test_reasoning(first: bool | None, text: str, reasoning: str, content: str) -> None:
    assert read([text], reasoning=True, reasons_first=first) == Said(content, reasoning)


def test_calls_in_the_reasoning_are_no_calls() -> None:
    said = read([f"<think>{hermes(CALLS)}</think>\n\n{hermes(CALLS[1:])}"], form=HERMES, reasoning=True)
    assert called(said) == CALLS[1:]
    assert (said.reasoning, said.content) == (hermes(CALLS), "")


def test_reasoning_that_is_not_wanted() -> None:
    assert read(["<think>a</think>b"], reasoning=True, show_reasoning=False) == Said("b")


def test_where_an_answer_begins_is_in_the_prompt() -> None:
    r1, qwen = ReasoningParser.DEEPSEEK_R1, ReasoningParser.QWEN3
    assert [reasons_first(r1, end) for end in ("<think>\n", "</think>\n\n", "<｜Assistant｜>")] == [True, False, True]
    assert [reasons_first(qwen, end) for end in ("<think>\n", "</think>\n\n", "assistant\n")] == [True, False, None]


def test_formats_by_name_and_by_template() -> None:
    named = {each: format_for(each, "") for each in ToolCallParser}
    assert named == {ToolCallParser.AUTO: None, ToolCallParser.NONE: None} | FORMATS
    auto = {name: format_for(ToolCallParser.AUTO, text) for name, text in TEMPLATES.items()}
    assert {name: form for name, form in auto.items() if form} == {
        "qwen_tool_calls": HERMES, "mistral_tool_calls": MISTRAL, "llama_tool_calls": LLAMA_JSON,
        "deepseek_tool_calls": DEEPSEEK,
    }  # fmt: skip
