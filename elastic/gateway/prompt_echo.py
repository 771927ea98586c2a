"""A prompt as part of its answer: its text and the log probabilities of its tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from elastic.gateway.tokenizer import Tokenizer
from workers.protocol.messages import TokenLogprobs


class TokenEntry(NamedTuple):
    """A token with its log probabilities; `offset`: where its text begins, in characters.

    The first token of all has none: nothing comes before it.
    """

    token: int
    logprobs: TokenLogprobs | None
    offset: int


def prompt_entries(tokenizer: Tokenizer, prompt: Sequence[int], scores: Sequence[TokenLogprobs]) -> list[TokenEntry]:
    """The prompt's tokens; `scores`: of all but the first."""
    detokenizer = tokenizer.detokenizer(())
    offset = 0
    entries: list[TokenEntry] = []
    for token, logprobs in zip(prompt, (None, *scores), strict=True):
        entries.append(TokenEntry(token, logprobs, offset))
        offset += len(detokenizer.push(token))
    return entries


def fewer(scores: Sequence[TokenLogprobs], top: int) -> list[TokenLogprobs]:
    """The same with at most `top` of the likeliest tokens each."""
    return [TokenLogprobs(each.logprob, each.top[:top], each.rank) for each in scores]
