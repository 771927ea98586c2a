"""Requests as parsed and choices as they grow: what the wire tests do not pin down."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.gateway.choice import Choice, Extent
from elastic.gateway.journal import Delta
from elastic.gateway.schema import MAX_SEED, ChatRequest, CompletionRequest, parse, seed_for
from elastic.gateway.text import StopMatcher
from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import RequestError
from tests.support.tiny_tokenizer import write_tokenizer
from workers.protocol.messages import TokenLogprobs

pytestmark = pytest.mark.unit

TEXT = "hello wörld, this is 😀 a test of the gateway"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@given(st.lists(st.integers(0, 60)), st.sampled_from([[], ["wör"], [" test", "gate"], ["y"], ["😀 a"]]))
def test_how_tokens_are_cut_into_messages_does_not_matter(
    tokenizer: Tokenizer, cuts: list[int], stops: list[str]
) -> None:
    ids = tokenizer.encode(TEXT)[1:]
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    choice, text, entries = Choice(tokenizer, [1], StopMatcher(stops)), "", 0
    for start, end in pairwise(edges):
        tokens = tuple(ids[start:end])
        logprobs = tuple(TokenLogprobs(-1.0) for _ in tokens)
        piece = choice.push(Delta(tokens, logprobs, "stop" if end == len(ids) else ""))
        text, entries = text + piece.text, entries + len(piece.entries)
        if piece.finish_reason:
            break
    found = [TEXT.find(stop) for stop in stops if stop in TEXT]
    assert text == choice.text == (TEXT[: min(found)] if found else TEXT)
    assert choice.finish_reason == "stop"
    assert entries == choice.tokens == len(choice.entries)


@given(st.lists(st.integers(0, 60)), st.integers(0, 30), st.booleans())
def test_min_tokens_and_the_stop_string_itself(tokenizer: Tokenizer, cuts: list[int], least: int, keep: bool) -> None:
    """Stop strings that are complete within `min_tokens` tokens do not count; the first one after them does."""
    ids = tokenizer.encode(TEXT)[1:]
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    choice = Choice(tokenizer, [1], StopMatcher(["e", "te"], keep=keep), Extent(least))
    for start, end in pairwise(edges):
        if choice.push(Delta(tuple(ids[start:end]), None, "stop" if end == len(ids) else "")).finish_reason:
            break
    passed = len(tokenizer.decode(ids[:least]).rstrip("\ufffd"))
    ends = [at + 1 for at in range(len(TEXT)) if TEXT[at] == "e" and at + 1 > passed]
    wanted = TEXT
    if ends:
        starts = ends[0] - (2 if TEXT[ends[0] - 2 : ends[0]] == "te" and not keep else 1)
        wanted = TEXT[: ends[0]] if keep else TEXT[:starts]
    assert choice.text == wanted


def test_an_unfinished_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab😀")[1:-1]
    choice = Choice(tokenizer, [], StopMatcher([]))
    assert choice.push(Delta(tuple(ids))).text == "ab"
    assert choice.push(Delta((), None, "length")).text == "\ufffd"


def test_no_two_choices_share_a_seed() -> None:
    seeds = [*range(-200, 200), MAX_SEED, -MAX_SEED - 1]
    assert len({seed_for(seed, n) for seed in seeds for n in range(64)}) == 64 * len(seeds), "also of other requests"
    assert seed_for(5, 0) == 5
    for seed, choice in [(-MAX_SEED - 1, 0), (-1, 0), (0, 1), (5, 3), (MAX_SEED, 63)]:
        assert MAX_SEED < seed_for(seed, choice) < 1 << 64, "none that a client asks for has it, and it can be sent"


def test_null_means_not_given() -> None:
    asked = parse(
        b'{"model":"m","prompt":"x","temperature":null,"stop":null,"seed":null,"echo":null}', CompletionRequest
    )
    assert (asked.temperature, asked.stop, asked.seed) == (1.0, [], None)


def test_the_newer_name_of_the_token_limit_wins() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":5,"max_completion_tokens":7}'
    assert parse(body, ChatRequest).token_limit == 7


def test_templates_get_what_was_said() -> None:
    """Roles, names and lists of parts are the template's to read; null is not given."""
    parts = [{"type": "text", "text": "xy"}, {"type": "text", "text": "z"}]
    said = [{"role": "developer", "content": parts, "name": "Bob"}, {"role": "user", "content": "xyz", "name": None}]
    messages = parse(json.dumps({"model": "m", "messages": said}).encode(), ChatRequest).messages
    assert [message.plain() for message in messages] == [said[0], {"role": "user", "content": "xyz"}]
    assert [message.characters for message in messages] == [3, 3]


def test_a_million_wrong_items_are_one_error() -> None:
    body = b'{"model":"m","prompt":[' + b",".join([b"1.5"] * 500_000) + b"]}"
    with pytest.raises(RequestError, match="prompt must be"):
        parse(body, CompletionRequest)
