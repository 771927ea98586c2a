"""Tokenizers of all kinds against transformers: what goes in, what comes out, and streams that add up for every cut."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from elastic.gateway.choice import Choice
from elastic.gateway.journal import Delta
from elastic.gateway.text import REPLACEMENT, Detokenizer, StopMatcher
from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import ModelError
from tests.support.wild_templates import TEMPLATES
from tests.support.wild_tokenizers import CORPUS, WILD, write_wild_tokenizer

pytestmark = pytest.mark.unit

BYTE_FALLBACK = ("llama2", "mistral", "gemma")
TEXTS = [
    *CORPUS, "", " ", "   a", "😀 emoji 👩‍👩‍👧 🇩🇪", "\n\n\ttabs\r\n",
    "a . b ? c ' d n't 've \u2581x", "e\u0301 \ufb01 ① \x00\x7f",
    "<s> hi </s> <think>x</think> [INST] y [/INST]", "a <mark> b <Mixed>c<late> d <plain> <image><|im_end|> \n",
    "<｜begin▁of▁sentence｜>x<｜User｜>", "\ufffd replaced \ufffd",
]  # fmt: skip
texts = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from([*"😀日ö .'!?,a", " n't", "the ", "<s>", "</s>", " 's", "語"]), max_size=10).map("".join),
)


@cache
def pair(name: str) -> tuple[Tokenizer, Any]:
    """One kind of tokenizer, as we and as transformers read it."""
    with TemporaryDirectory() as directory:
        write_wild_tokenizer(Path(directory), name)
        return Tokenizer(Path(directory)), PreTrainedTokenizerFast.from_pretrained(directory)


def whole_characters(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether each run of byte tokens is UTF-8. transformers gives nothing but U+FFFD for a run that is not."""
    runs = "".join(chr(byte) if (byte := tokenizer._bytes.get(i)) is not None else "|" for i in ids)
    try:
        for run in runs.split("|"):
            run.encode("latin-1").decode()
    except UnicodeDecodeError:
        return False
    return True


def streamed(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


def added(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """What an answer adds to the text of its prompt; a character that the prompt left incomplete is the answer's."""
    before, text = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    return text[len(before) if text.startswith(before) else len(before) - tokenizer.unsettled(before) :]


@pytest.mark.parametrize("name", WILD)
def test_text_in_and_out_is_that_of_transformers(name: str) -> None:
    ours, theirs = pair(name)
    assert ours.specials == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert streamed(ours.detokenizer([]), ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("name", WILD)
def test_prompts_of_conversations_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    write_wild_tokenizer(tmp_path, name)
    messages = [{"role": "user", "content": TEXTS[-3]}, {"role": "assistant", "content": "日本 <s>"}]
    for template in ("chatml", "llama3", "deepseek", "gemma_with_parts"):
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES[template], encoding="utf-8")
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert Tokenizer(tmp_path).encode_chat(messages) == wanted


@pytest.mark.parametrize("name", WILD)
@given(text=texts, cut=st.integers(0, 30))
def test_streams_of_text_add_up_for_every_cut(name: str, text: str, cut: int) -> None:
    ours, theirs = pair(name)
    ids = theirs(text)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    prompt, answer = ids[:cut], ids[cut:]
    assert streamed(ours.detokenizer(prompt), answer) == added(ours, prompt, answer)


@pytest.mark.parametrize("name", WILD)
@given(data=st.data())
def test_streams_of_any_tokens_add_up_for_every_cut(name: str, data: st.DataObject) -> None:
    ours, theirs = pair(name)
    tokens = st.integers(0, ours.vocab_size - 1)
    prompt, answer = data.draw(st.lists(tokens, max_size=12)), data.draw(st.lists(tokens, max_size=100))
    assert streamed(ours.detokenizer(prompt), answer) == added(ours, prompt, answer)
    if whole_characters(ours, answer):
        assert ours.decode(answer) == theirs.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("name", WILD)
@given(text=texts, stop=texts, data=st.data())
def test_an_answer_ends_before_its_first_stop_string(name: str, text: str, stop: str, data: st.DataObject) -> None:
    """Wherever the prompt ends, and however the tokens come."""
    ours, _ = pair(name)
    ids = ours.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    answer = added(ours, ids[:cut], ids[cut:])
    start = data.draw(st.integers(0, len(answer)))
    stops = [each for each in (stop, answer[start : start + 3]) if each]
    choice, rest = Choice(ours, ids[:cut], StopMatcher(stops)), ids[cut:]
    while not choice.finish_reason:
        size = data.draw(st.integers(1, 9))
        choice.push(Delta(tuple(rest[:size]), None, "" if rest[size:] else "length"))
        rest = rest[size:]
    ends = [(answer.find(each) + len(each), answer.find(each)) for each in stops if each in answer]
    assert choice.text == (answer[: min(ends)[1]] if ends else answer)
    assert choice.finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize("name", [*BYTE_FALLBACK, "gpt2"])
def test_each_character_comes_with_its_last_byte(name: str) -> None:
    ours, _ = pair(name)
    detokenizer = ours.detokenizer(ours.encode("日"))
    ids = ours.encode("😀ß日𝔘😀")
    pieces = list(map(detokenizer.push, ids))
    assert "".join(pieces).lstrip() == "😀ß日𝔘😀", "nothing is left for the end"
    assert all(len(piece.strip()) <= 1 for piece in pieces)


@pytest.mark.parametrize("name", BYTE_FALLBACK)
def test_whole_characters_stay_when_an_answer_ends_inside_the_next(name: str) -> None:
    """Here we differ from transformers, which loses the whole run: what was streamed cannot be taken back."""
    ours, theirs = pair(name)
    ids = ours.encode("a 😀😀")[:-1]
    assert ours.decode(ids).strip() == "a 😀\ufffd"
    assert theirs.decode(ids, skip_special_tokens=True).strip() == "a " + 7 * REPLACEMENT
    assert streamed(ours.detokenizer([]), ids) == ours.decode(ids)


@pytest.mark.parametrize("name", [*BYTE_FALLBACK, "gpt2"])
def test_a_prompt_that_ends_inside_a_character(name: str) -> None:
    ours, _ = pair(name)
    ids = ours.encode("x😀 the end")
    inside = next(n for n in range(len(ids)) if ours.decode(ids[:n]).endswith(REPLACEMENT))
    assert streamed(ours.detokenizer(ids[:inside]), ids[inside:]) == "😀 the end"
    assert streamed(ours.detokenizer(ids[:inside]), ours.encode(" the end")).endswith("the end")


def test_garbage_without_end_is_neither_held_nor_decoded_again() -> None:
    ours, _ = pair("llama2")
    byte = ours.encode("😀")[-1]
    longest = 0

    def decode(ids: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return ours.decode(ids)

    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(byte) for _ in range(500)]
    assert "".join(pieces) == 499 * REPLACEMENT
    assert longest < 100


@pytest.mark.parametrize("name", ["deepseek", "llama2", "qwen", "t5"])
def test_bytes_of_tokens_are_those_of_the_text(name: str) -> None:
    ours, _ = pair(name)
    ids = ours.encode("日ö hello 😀")
    specials = set(ours.specials.values())
    plain = [ours.token_bytes(i) for i in ids if ours.token_bytes(i).decode(errors="replace") not in specials]
    if "<unk>" in ours.decode(ids) or name == "t5":
        assert b"hello" in b"".join(plain)
    else:
        assert b"".join(plain).decode().lstrip() == "日ö hello 😀"
    for text in specials:
        assert ours.token_bytes(ours.encode(text)[-1]) == text.encode()


def test_a_broken_table_of_tokens_is_told(tmp_path: Path) -> None:
    write_wild_tokenizer(tmp_path, "gpt2")
    for broken in ('{"added_tokens_decoder": {"x": {}}}', '{"added_tokens_decoder": {"1": "x"}}', "[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(broken, encoding="utf-8")
        with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
            Tokenizer(tmp_path)
