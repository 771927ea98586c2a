"""One choice of a response: tokens become text here, and here it ends at a stop string. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from elastic.gateway.journal import Delta
from elastic.gateway.text import StopMatcher
from elastic.gateway.tokenizer import Tokenizer
from workers.protocol.messages import TokenLogprobs


class TokenEntry(NamedTuple):
    """A token with its log-probabilities; `offset`: where its text begins, in characters."""

    token: int
    logprobs: TokenLogprobs
    offset: int


class Piece(NamedTuple):
    """What a delta adds to the choice. `stopped`: at a stop string, which the engine does not know of."""

    text: str
    entries: tuple[TokenEntry, ...] = ()
    finish_reason: str = ""
    stopped: bool = False


class Choice:
    """The text and token entries of a choice so far."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: StopMatcher,
        min_tokens: int = 0,
        *,
        first: bool = True,
    ) -> None:
        """`first`: of its prompt's choices. Usage counts a prompt once."""
        self.text = ""
        self.entries: list[TokenEntry] = []
        self.tokens = 0
        self.cached = 0  # tokens of its prompt that were not computed, if it counts the prompt
        self._first = first
        self.finish_reason = ""
        self._detokenizer = tokenizer.detokenizer(prompt)
        self._stops = stops
        self._min_tokens = min_tokens  # text of no more tokens is not searched for stop strings
        self._offset = 0  # characters of all tokens' text, held back ones included

    def push(self, delta: Delta) -> Piece:
        """Add a delta; return the text that can be sent because of it."""
        text, stopped = "", False
        self.cached += delta.cached if self._first else 0
        entries: list[TokenEntry] = []
        for number, token in enumerate(delta.tokens):
            self.tokens += 1
            if delta.logprobs is not None:
                entries.append(TokenEntry(token, delta.logprobs[number], self._offset))
            fresh, stopped = self._pass(self._detokenizer.push(token))
            text += fresh
            if stopped:
                break
        reason = "stop" if stopped else delta.finish_reason
        if reason and not stopped:
            fresh, stopped = self._pass(self._detokenizer.flush())
            text += fresh if stopped else fresh + self._stops.flush()
            reason = "stop" if stopped else reason
        self.text += text
        self.entries += entries
        self.finish_reason = reason
        return Piece(text, tuple(entries), reason, stopped)

    def _pass(self, text: str) -> tuple[str, bool]:
        self._offset += len(text)
        return self._stops.push(text, armed=self.tokens > self._min_tokens)
