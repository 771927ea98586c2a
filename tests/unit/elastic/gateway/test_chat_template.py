"""Chat templates against `apply_chat_template` of transformers, and what only we do: contents of either kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from elastic.gateway.chat_template import REFUSALS, ChatTemplate
from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import RequestError
from tests.support.wild_templates import DEVELOPER, ONLY_PARTS, TEMPLATES
from tests.support.wild_tokenizers import write_wild_tokenizer

pytestmark = pytest.mark.unit

Messages = list[dict[str, Any]]
REFUSED = "refused"
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {"type": "object", "x": [1]}}}
]
DOCUMENTS = [{"title": "Straße", "text": "x"}, {"title": "y", "text": ""}]
CONVERSATIONS: list[Messages] = [
    [{"role": "user", "content": "hi <b> ü '\"&"}],
    [{"role": "system", "content": " be brief "}, {"role": "user", "content": " \nhi\n "}],
    [
        {"role": "user", "content": "日本"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\n語"},
        {"role": "user", "content": "{{ 1 }} {% raw %}"},
    ],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a", "name": "Bob"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": ""},
    ],
    [{"role": "assistant", "content": "first"}, {"role": "system", "content": "late"}],
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(write_wild_tokenizer(tmp_path_factory.mktemp("t"), "llama2"))


def expected(theirs: Any, template: str, messages: Messages, **variables: Any) -> str:
    """What transformers makes of it; its errors are as many as Python has."""
    try:
        return str(
            theirs.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
            )
        )
    except REFUSALS:
        return REFUSED


def rendered(template: ChatTemplate, messages: Messages, **variables: Any) -> str:
    try:
        return template.render(messages, **variables)
    except RequestError:
        return REFUSED


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "only_parts"])
def test_prompts_are_those_of_transformers(theirs: Any, name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], theirs.special_tokens_map)
    for messages in CONVERSATIONS:
        for tools, documents in ((None, None), (TOOLS, DOCUMENTS)):
            wanted = expected(theirs, TEMPLATES[name], messages, tools=tools, documents=documents)
            assert rendered(template, messages, tools=tools, documents=documents) == wanted


@given(
    st.sampled_from(sorted(set(TEMPLATES) - {"only_parts"})),
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=8)},
            optional={"name": st.text(min_size=1, max_size=3)},
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_prompts_of_any_conversation_are_those_of_transformers(theirs: Any, name: str, messages: Messages) -> None:
    template = ChatTemplate(TEMPLATES[name], theirs.special_tokens_map)
    assert rendered(template, messages) == expected(theirs, TEMPLATES[name], messages)


def in_parts(messages: Messages) -> Messages:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


@pytest.mark.parametrize("name", ["gemma_with_parts", "only_parts", "sorted_json"])
def test_a_template_that_reads_parts_gets_them(theirs: Any, name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], theirs.special_tokens_map)
    for messages in map(in_parts, CONVERSATIONS):
        assert rendered(template, messages) == expected(theirs, TEMPLATES[name], messages)


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "mistral_with_tools", "alpaca", "gemma", "vicuna"])
def test_a_template_that_reads_text_gets_the_text_of_parts(theirs: Any, name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], theirs.special_tokens_map)
    for messages in CONVERSATIONS:
        assert rendered(template, in_parts(messages)) == rendered(template, messages)
    two = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert rendered(template, two) == rendered(template, [{"role": "user", "content": "ab"}]) != REFUSED


def with_call(arguments: Any, content: str | None) -> Messages:
    """As an agent sends its history, or as a template reads it."""
    call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "f", "arguments": arguments}}
    said = {"role": "assistant", "tool_calls": [call]} | ({} if content == "left out" else {"content": content})
    result = {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "21 °C"}
    return [{"role": "user", "content": "weather?"}, said, result, {"role": "user", "content": "thanks"}]


@pytest.mark.parametrize("name", ["qwen_tool_calls", "mistral_tool_calls", "llama_tool_calls", "deepseek_tool_calls"])
def test_a_template_gets_tool_calls_as_it_reads_them(theirs: Any, name: str) -> None:
    """Clients send the arguments as text, and no content or an empty one; templates differ in what they read."""
    template = ChatTemplate(TEMPLATES[name], theirs.special_tokens_map)
    arguments = {"city": "Köln", "n": [1]}
    messages = [with_call(json.dumps(arguments, ensure_ascii=False), sent) for sent in (None, "", "left out")]
    texts = {rendered(template, each, tools=TOOLS) for each in messages}
    if name == "deepseek_tool_calls":  # transformers cannot: it leaves out a content that is null
        (text,) = texts
        assert '<｜tool▁sep｜>f\n```json\n{"city": "Köln", "n": [1]}\n```<' in text
        assert "21 °C" in text
    else:
        assert texts == {expected(theirs, TEMPLATES[name], with_call(arguments, None), tools=TOOLS)} != {REFUSED}
    spoken = with_call(json.dumps(arguments), "Let me see.")
    if name in ("qwen_tool_calls", "llama_tool_calls"):
        assert rendered(template, spoken) == expected(theirs, TEMPLATES[name], with_call(arguments, "Let me see."))


def test_calls_that_a_template_would_leave_out_are_refused() -> None:
    for name in ("chatml", "llama2", "alpaca", "deepseek"):
        template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
        with pytest.raises(RequestError, match="no place for the tool calls"):
            template.render(with_call("{}", None))


@pytest.mark.parametrize("name", ["qwen_tool_calls", "llama_tool_calls", "mistral_tool_calls"])
def test_a_call_whose_arguments_were_cut_off_may_be_sent_back(name: str) -> None:
    """Agents do that, with what is wrong about it as the tool's answer."""
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    text = template.render(with_call('{"city": 5, "n', None), tools=TOOLS)
    assert '{"city": 5, "n' in text.replace('\\"', '"')


def test_what_is_asked_for_and_a_template_does_not_read_is_refused() -> None:
    reads, not_at_all = ChatTemplate(TEMPLATES["qwen_tool_calls"], {}), ChatTemplate(TEMPLATES["chatml"], {})
    for variables in ({"tools": TOOLS}, {"reasoning_effort": "low"}):
        reads.require(variables)
        with pytest.raises(RequestError, match="no place for"):
            not_at_all.require(variables)
    not_at_all.require({"tools": [], "enable_thinking": False})
    assert reads.render([{"role": "user", "content": "x"}], reasoning_effort="low").endswith("[low]")
    ChatTemplate("{% if %}", {}).require({"tools": TOOLS})  # that it is broken is told when it is rendered


def test_a_variable_may_have_any_name() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ self_ }}", {})
    assert template.render([{"role": "user", "content": "x"}], **{"messages": 1, "self": 2, "self_": 3}) == "x3"


def test_a_template_that_reads_only_parts_gets_text_as_one() -> None:
    template = ChatTemplate(ONLY_PARTS, {})
    assert template.render([{"role": "user", "content": "hi"}]) == "<user>hi;<assistant>"


def test_the_developer_is_the_system_where_a_template_does_not_know_it() -> None:
    message = {"role": "developer", "content": "x"}
    assert ChatTemplate(TEMPLATES["chatml"], {}).render([message]).startswith("<|im_start|>system\nx")
    assert ChatTemplate("{{ messages[0].role }} developer", {}).render([message]) == "developer developer"
    assert ChatTemplate(DEVELOPER, {}).render([message]).startswith("<|start|>developer<|message|>x")


def test_a_broken_template_is_told() -> None:
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate("{% if %}", {}).render([{"role": "user", "content": "x"}])


def files(directory: Path, **texts: str) -> Path:
    """A checkpoint's directory with template files; `config`: that of tokenizer_config.json, as JSON."""
    write_wild_tokenizer(directory, "llama3")
    for name, text in texts.items():
        if name == "config":
            path = directory / "tokenizer_config.json"
            settings = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": json.loads(text)}
            path.write_text(json.dumps(settings), encoding="utf-8")
        else:
            path = directory / ("chat_template.jinja" if name == "file" else f"additional_chat_templates/{name}.jinja")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    "texts",
    [
        {"config": '"config {{ bos_token }}"'},
        {"config": '[{"name": "rag", "template": "rag"}, {"name": "default", "template": "one of them"}]'},
        {"file": "ä file {{ eos_token }}{{ unk_token }}"},
        {"file": "file", "config": '"config"'},
        {"file": "file", "rag": "rag"},
        {"file": "file", "rag": "rag", "config": '[{"name": "default", "template": "config"}]'},
        {"rag": "rag", "config": '"hidden by the files"'},
        {},
    ],
    ids=str,
)
def test_the_template_is_the_one_that_transformers_takes(tmp_path: Path, texts: dict[str, str]) -> None:
    directory = files(tmp_path, **texts)
    ours = Tokenizer(directory)
    messages = [{"role": "user", "content": "x"}]
    try:
        wanted = PreTrainedTokenizerFast.from_pretrained(directory).apply_chat_template(messages)["input_ids"]
    except ValueError:  # it has no default
        assert not ours.has_chat_template
        with pytest.raises(RequestError, match="no chat template"):
            ours.encode_chat(messages)
    else:
        assert ours.encode_chat(messages) == wanted
