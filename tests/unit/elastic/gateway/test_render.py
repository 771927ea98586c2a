"""How answers are written: log-probabilities of completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic.gateway.answer.said import Said
from elastic.gateway.choice import Choice, Piece
from elastic.gateway.journal import Delta
from elastic.gateway.render import ChatRenderer, CompletionRenderer, UsageShown
from elastic.gateway.responses import ResponseRenderer
from elastic.gateway.responses_schema import ResponsesRequest
from elastic.gateway.schema import parse
from elastic.gateway.text import StopMatcher
from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import RequestError
from tests.support.tiny_tokenizer import write_tokenizer
from workers.protocol.messages import TokenLogprobs

pytestmark = pytest.mark.unit


def test_usage_counts_what_was_cached_of_a_prompt_once(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    choices = [Choice(tokenizer, [1] * 40, StopMatcher([]), first=number == 0) for number in range(2)]
    for choice in choices:
        choice.push(Delta((5,), cached=32))
        choice.push(Delta((6,), finish_reason="length"))
    renderer = CompletionRenderer(tokenizer, "id", "m", 0, UsageShown())
    usage = renderer.whole(40, choices)["usage"]
    assert usage == {
        "prompt_tokens": 40, "completion_tokens": 4, "total_tokens": 44, "prompt_tokens_details": {"cached_tokens": 32},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("top", "likeliest"),
    [
        ([], []),  # logprobs=0
        (["d", "b"], ["d", "b"]),  # sampled: none of the likeliest
        (["a", "b"], ["b"]),
    ],
)
def test_the_sampled_token_is_among_the_top_ones(tmp_path: Path, top: list[str], likeliest: list[str]) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    token = {each: tokenizer.encode(each)[-1] for each in "abd"}
    logprobs = TokenLogprobs(-3.0, [(token[each], -1.0 if each != "a" else -3.0) for each in top])
    choice = Choice(tokenizer, [1], StopMatcher([]))
    choice.push(Delta([token["a"]], [logprobs], "stop"))
    renderer = CompletionRenderer(tokenizer, "id", "m", 0, UsageShown())
    (found,) = renderer.whole(1, [choice])["choices"][0]["logprobs"]["top_logprobs"]
    assert found == {"a": -3.0} | dict.fromkeys(likeliest, -1.0)


@pytest.mark.parametrize("shown", [UsageShown(), UsageShown(at_end=True), UsageShown(in_each=True)])
def test_a_chunk_is_the_json_of_its_parts_in_their_order(tmp_path: Path, shown: UsageShown) -> None:
    """Whatever the model is named: what is the same in all chunks is encoded once."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    choice = Choice(tokenizer, [1] * 3, StopMatcher([]))
    choice.push(Delta((5,)))
    model = 'a"choices":[ü'
    usage: dict[str, Any] = {"usage": None} if shown.at_end else {}
    if shown.in_each:
        usage = {"usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4,
                           "prompt_tokens_details": {"cached_tokens": 0}}}  # fmt: skip
    for kind, name, begins, parts in (
        (CompletionRenderer, "text_completion", [], {"text": "é\n"}),
        (ChatRenderer, "chat.completion.chunk", [{"role": "assistant", "content": ""}], {"delta": {"content": "é\n"}}),
    ):
        renderer = kind(tokenizer, "id", model, 9, shown)
        said = renderer.said(2, Piece("é\n", said=Said("é\n")), 3, [choice])
        rest = {"logprobs": None, "finish_reason": None}
        envelope = {"id": "id", "object": name, "created": 9, "model": model}
        wanted = [{"index": 2, "delta": delta} | rest for delta in begins] + [{"index": 2} | parts | rest]
        chunks = [envelope | {"choices": [each]} | usage for each in wanted]
        compact = (json.dumps(each, ensure_ascii=False, separators=(",", ":")) for each in chunks)
        assert said.decode() == "".join(f"data: {each}\n\n" for each in compact)
        assert renderer.said(2, Piece(""), 3, [choice]) == b""


def test_a_response_that_breaks_off_says_why_in_its_last_event() -> None:
    asked = parse(b'{"model": "m", "input": "x"}', ResponsesRequest)
    renderer = ResponseRenderer("1", asked, 0)
    first = renderer.said(0, Piece("a", said=Said("a")), 1, [])
    assert first.count(b"event: ") == 5
    name, data = renderer.failed(RequestError("no rank", status=503)).decode().strip().split("\n")
    event = json.loads(data.removeprefix("data: "))
    assert name == "event: response.failed"
    assert (event["sequence_number"], event["response"]["status"]) == (5, "failed")
    assert event["response"]["error"] == {"code": "server_error", "message": "no rank"}
