"""Which tokens may come next under a grammar: JSON of a schema, a regular expression, one of several texts.

A pure function of the grammar and of the tokens written so far. What is kept is a cache: a rank that has none, because
it is new or the request came from another one, builds the same state again from those tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import structlog

from membership.base.errors import ModelError, RequestError
from workers.model.content import changed, file_digest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

TOKENIZER_FILE = "tokenizer.json"
KEPT = 256  # states, about as many as a rank has requests
KEPT_GRAMMARS = 32
# What a grammar may cost, in the library's units: they count work, so that all ranks and gateways find the same.
LIMITS = {"initial_lexer_fuel": 500_000, "max_lexer_states": 20_000, "max_grammar_size": 100_000}
Tokens = npt.NDArray[np.uint32]
log = structlog.get_logger(__name__)


def matcher_of(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """The state before the first token. RequestError if the grammar is none, or costs more than `LIMITS`."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(**LIMITS, precompute_large_lexemes=False, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    _require_sound(matcher)
    return matcher


def mask_of(matcher: LLMatcher) -> npt.NDArray[np.bool_]:
    """Which tokens may come next. RequestError if none may, or if it costs too much to find out."""
    mask: npt.NDArray[np.bool_] = np.frombuffer(matcher.compute_logit_bias(), np.uint8) > 0
    _require_sound(matcher)
    return mask


def _require_sound(matcher: LLMatcher) -> None:
    if problem := " ".join(matcher.get_error().split())[:300]:
        hint = "no text follows it: " if "NoExtension" in problem else ""
        raise RequestError(f"the grammar cannot be followed: {hint}{problem}", code="invalid_value")


class Grammars:
    """The grammars of a rank's requests. `ends`: the model's end tokens, which may follow where a text is complete.

    `digest`: of the tokenizer that the cluster serves; empty: whatever is there.
    """

    def __init__(self, tokenizer_file: Path, ends: Iterable[int], digest: str = "") -> None:
        self._file, self._ends, self._digest = tokenizer_file, sorted(ends), digest
        self._tokenizer: LLTokenizer | None = None
        self._grammars: OrderedDict[str, LLMatcher] = OrderedDict()
        self._states: OrderedDict[tuple[str, bytes], LLMatcher] = OrderedDict()

    def read(self) -> None:
        """Read the tokenizer while the rank loads: a large one takes a second, for which no step should wait."""
        try:
            self._tokenizer = self._read()
        except (ModelError, OSError, ValueError) as error:
            log.warning("no_structured_output", reason=str(error)[:200])

    def allowed(self, grammar: str, written: Tokens, size: int) -> npt.NDArray[np.bool_]:
        """Which of `size` tokens may follow. RequestError if none may; ModelError if this rank cannot tell."""
        key, matcher = self._state(grammar, written)
        found = mask_of(matcher)[:size]
        self._keep(key, matcher)
        mask = np.zeros(size, np.bool_)
        mask[: found.size] = found
        return mask

    def _state(self, grammar: str, written: Tokens) -> tuple[tuple[str, bytes], LLMatcher]:
        """The matcher after these tokens: as it is, one token further, or made anew."""
        key = grammar, written.tobytes()
        matcher = self._states.pop(key, None)
        if matcher is not None:
            return key, matcher
        matcher = self._states.pop((grammar, written[:-1].tobytes()), None) if written.size else None
        fresh = written[-1:] if matcher is not None else written
        matcher = matcher or self._beginning(grammar)
        if fresh.size and matcher.try_consume_tokens(fresh.tolist()) != fresh.size:
            raise RequestError(f"the answer does not follow its grammar: {matcher.get_error()[:300]}")
        return key, matcher

    def _keep(self, key: tuple[str, bytes], matcher: LLMatcher) -> None:
        self._states[key] = matcher
        if len(self._states) > KEPT:
            self._states.popitem(last=False)

    def _beginning(self, grammar: str) -> LLMatcher:
        """A copy of the grammar's first state: it is compiled once."""
        found = self._grammars.pop(grammar, None)
        if found is None:
            self._tokenizer = self._tokenizer or self._read()
            found = matcher_of(self._tokenizer, grammar)
            mask_of(found)  # before its first mask, the library follows a text without a choice beyond all limits
        self._grammars[grammar] = found
        if len(self._grammars) > KEPT_GRAMMARS:
            self._grammars.popitem(last=False)
        return found.deep_copy()

    def _read(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._digest and file_digest(self._file) != self._digest:
            raise changed(self._file.parent, [self._file.name])
        return LLTokenizer(str(self._file), eos_token=self._ends)
