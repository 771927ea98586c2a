"""What a request adds to a row of logits before a token is chosen: penalties, biases, tokens that are barred.

A pure function of the logits and of the request's own tokens: no state, so any rank that runs a step again, or takes a
request over, chooses the same token. The meanings and their order are vLLM's: what is barred, biases, then penalties.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from membership.base.errors import RequestError
from workers.protocol.messages import Shaping

Row = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.uint32]


def shape(logits: Row, shaping: Shaping, known: Tokens, prompt: int) -> Row:
    """The logits that count. `known`: all tokens of the request so far, of which the first `prompt` are its prompt.

    RequestError if no token is left to choose from.
    """
    row = logits.copy()
    outputs = known[prompt:]
    if shaping.allowed:
        allowed = np.frombuffer(shaping.allowed, np.uint32)
        row = np.full_like(logits, -np.inf)
        row[allowed] = logits[allowed]
    row[list(_barred(shaping, outputs))] = -np.inf
    if outputs.size < shaping.min_tokens:
        longer = row.copy()
        longer[shaping.end_tokens] = -np.inf
        if not shaping.grammar or np.isfinite(longer.max()):  # a grammar's end comes first
            row = longer
    for token, bias in shaping.bias:
        row[token] += bias
    _penalise(row, shaping, known, outputs)
    if not np.isfinite(row.max()):
        raise RequestError("no token may follow: the grammar, allowed_token_ids, bad_words and min_tokens leave none")
    return row


def _barred(shaping: Shaping, outputs: Tokens) -> Iterator[int]:
    """The last token of each bad word whose others are written."""
    for *before, last in shaping.bad_words:
        if not before or outputs[-len(before) :].tolist() == before:
            yield last


def _penalise(row: Row, shaping: Shaping, known: Tokens, outputs: Tokens) -> None:
    """Repetition looks at prompt and output, frequency and presence at the output alone."""
    if shaping.repetition_penalty != 1.0:
        seen = np.unique(known)
        row[seen] *= np.where(row[seen] > 0, 1 / shaping.repetition_penalty, shaping.repetition_penalty)
    if shaping.frequency_penalty or shaping.presence_penalty:
        written, times = np.unique(outputs, return_counts=True)
        row[written] -= shaping.frequency_penalty * times + shaping.presence_penalty
