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

from membership.base.errors import ModelError
from workers.model.content import changed, file_digest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

TOKENIZER_FILE = "tokenizer.json"
KEPT = 256  # states, about as many as a rank has requests
Tokens = npt.NDArray[np.uint32]


class Grammars:
    """The grammars of a rank's requests. `ends`: the model's end tokens, which may follow where a text is complete."""

    def __init__(self, tokenizer_file: Path, ends: Iterable[int]) -> None:
        self.digest = ""  # of the tokenizer that the cluster serves; empty: whatever is there
        self._file, self._ends = tokenizer_file, sorted(ends)
        self._tokenizer: LLTokenizer | None = None  # read when it is needed: few clusters ever do
        self._states: OrderedDict[tuple[str, bytes], LLMatcher] = OrderedDict()

    def allowed(self, grammar: str, written: Tokens, size: int) -> npt.NDArray[np.bool_]:
        """Which of `size` tokens may follow. ModelError if the tokens do not follow the grammar."""
        matcher = self._state(grammar, written)
        mask = np.zeros(size, np.bool_)
        found = np.frombuffer(matcher.compute_logit_bias(), np.uint8)[:size] > 0
        mask[: found.size] = found
        if error := matcher.get_error():
            raise ModelError(f"the grammar cannot be followed: {error}")
        return mask

    def _state(self, grammar: str, written: Tokens) -> LLMatcher:
        """The matcher after these tokens: as it is, one token further, or made anew."""
        key = grammar, written.tobytes()
        matcher = self._states.pop(key, None)
        if matcher is None:
            matcher = self._states.pop((grammar, written[:-1].tobytes()), None) if written.size else None
            fresh = written[-1:] if matcher is not None else written
            matcher = matcher or self._matcher(grammar)
            if fresh.size and matcher.try_consume_tokens(fresh.tolist()) != fresh.size:
                raise ModelError(f"the answer does not follow its grammar: {matcher.get_error()}")
        self._states[key] = matcher
        if len(self._states) > KEPT:
            self._states.popitem(last=False)
        return matcher

    def _matcher(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLTokenizer

        if self._tokenizer is None:
            if self.digest and file_digest(self._file) != self.digest:
                raise changed(self._file.parent, [self._file.name])
            self._tokenizer = LLTokenizer(str(self._file), eos_token=self._ends)
        return LLMatcher(self._tokenizer, grammar, log_level=0)
