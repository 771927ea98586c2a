"""One choice of a response: tokens become text here, and here it ends at a stop string. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from elastic.gateway.answer.reader import Reader
from elastic.gateway.answer.said import NOTHING, Said, gathered
from elastic.gateway.journal import Delta
from elastic.gateway.prompt_echo import TokenEntry, fewer, prompt_entries
from elastic.gateway.text import StopMatcher
from elastic.gateway.tokenizer import Tokenizer
from workers.protocol.messages import TokenLogprobs


class Piece(NamedTuple):
    """What a delta adds to the choice. `stopped`: at a stop string, which the engine does not know of."""

    text: str
    entries: tuple[TokenEntry, ...] = ()
    finish_reason: str = ""
    stopped: bool = False
    said: Said = NOTHING  # the same text by what it is
    called: bool = False  # a tool, so far


@dataclass(frozen=True)
class Extent:
    """What of a sequence belongs to a choice."""

    min_tokens: int = 0  # text of no more tokens is not searched for stop strings
    echo: bool = False  # the prompt comes first
    answer: bool = True  # False: no token that was generated
    logprobs: int = -1  # how many of the likeliest tokens an entry has; -1: there are no entries
    prompt_logprobs: int = -1  # the same for what is said of the prompt beside the text


WHOLE = Extent()


class Choice:
    """The text and token entries of a choice so far."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: StopMatcher,
        extent: Extent = WHOLE,
        *,
        first: bool = True,
        reader: Reader | None = None,
    ) -> None:
        """`first`: of its prompt's choices. Usage counts a prompt once. `reader`: None: all is plain text."""
        self.text = ""
        self.entries: list[TokenEntry] = []
        self.tokens = 0
        self.cached = 0  # tokens of its prompt that were not computed, if it counts the prompt
        self._first = first
        self.finish_reason = ""
        self.prompt = prompt
        self.prompt_logprobs: list[TokenLogprobs] | None = None  # of all tokens but the first
        self._reader = reader
        self._said: list[Said] = []
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(prompt, reader.marks if reader else ())
        self._stops = stops
        self._extent = extent
        self._offset = 0  # characters of all tokens' text, held back ones included
        self._begun = False

    def push(self, delta: Delta) -> Piece:
        """Add a delta; return the text that can be sent because of it."""
        self.cached += delta.cached if self._first else 0
        text, entries = self._begin(delta)
        stopped, reason = False, delta.finish_reason
        if self._extent.answer:
            more, stopped = self._answer(delta, entries)
            text += more
            reason = "stop" if stopped else reason
        elif reason:
            reason = "length"
        self.text += text
        self.entries += entries
        self.finish_reason = reason
        said = self._read(text, ended=bool(reason))
        self._said.append(said)
        return Piece(text, tuple(entries), reason, stopped, said, self.called)

    @property
    def pieces(self) -> Sequence[Said]:
        """The text so far by what it is, in the pieces that it came in."""
        return self._said

    @property
    def said(self) -> Said:
        """The text so far by what it is."""
        return gathered(self._said)

    @property
    def called(self) -> bool:
        """Whether it has a tool call."""
        return self._reader is not None and self._reader.called

    def _read(self, text: str, *, ended: bool) -> Said:
        if self._reader is None:
            return Said(text)
        said = self._reader.push(text)
        return gathered((said, self._reader.flush())) if ended else said

    def _begin(self, delta: Delta) -> tuple[str, list[TokenEntry]]:
        """What comes before the first token."""
        if self._begun:
            return "", []
        self._begun, scores, extent = True, delta.prompt_logprobs, self._extent
        if scores is not None and extent.prompt_logprobs >= 0:
            self.prompt_logprobs = fewer(scores, extent.prompt_logprobs)
        if not self._extent.echo:
            return "", []
        text = self._tokenizer.decode(self.prompt)
        self._offset = len(text)
        if scores is None or extent.logprobs < 0:
            return text, []
        return text, prompt_entries(self._tokenizer, self.prompt, fewer(scores, extent.logprobs))

    def _answer(self, delta: Delta, entries: list[TokenEntry]) -> tuple[str, bool]:
        """The text of the delta's tokens, and whether it ends at a stop string; `entries` gets theirs."""
        text, stopped = "", False
        for number, token in enumerate(delta.tokens):
            self.tokens += 1
            if delta.logprobs is not None:
                entries.append(TokenEntry(token, delta.logprobs[number], self._offset))
            fresh, stopped = self._pass(self._detokenizer.push(token))
            text += fresh
            if stopped:
                return text, True
        if not delta.finish_reason:
            return text, False
        if delta.end is not None and self._stops.keep:
            text += self._pass(self._detokenizer.push(delta.end.token))[0]
        fresh, stopped = self._pass(self._detokenizer.flush())
        text += fresh if stopped else fresh + self._stops.flush()
        if delta.end is not None and delta.end.logprobs is not None and self._extent.echo:
            # Who scores a prompt leaves out the last entry, whatever it is: lm-eval does.
            entries.append(TokenEntry(delta.end.token, delta.end.logprobs, self._offset))
        return text, stopped

    def _pass(self, text: str) -> tuple[str, bool]:
        self._offset += len(text)
        return self._stops.push(text, armed=self.tokens > self._extent.min_tokens)
