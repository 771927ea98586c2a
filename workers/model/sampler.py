"""Chooses tokens from logits, each row by itself: its result depends on its logits, its settings and its position only.

The random number is a counter-based hash of (seed, position): no state, so any rank that runs a step again, or takes a
request over, draws the same token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from membership.base.errors import ModelError, RequestError
from workers.model.grammar import Grammars
from workers.model.shaping import shape
from workers.protocol.messages import NO_TOKEN, History, Sampling, Score, TokenLogprobs

GREEDY_BELOW = 1e-5  # a temperature that leaves nothing to chance, and by which no logit can be divided safely

NO_NUMBERS = "the model's logits for this request are no numbers: what it is made of overflows somewhere"
LEAST_LOGPROB = -9999.0  # of a token that cannot come: JSON has no infinity, and vLLM says this, too
TOGETHER = 1 << 15
"""Logits of rows whose probabilities are computed together."""
_TINY = np.finfo(np.float64).tiny  # less is no chance: what is barred
_MASK = (1 << 64) - 1
Row = npt.NDArray[np.float64]


class Drawn(NamedTuple):
    """What came of a row: a token, or why its request cannot have any."""

    token: int
    logprobs: TokenLogprobs | None = None
    error: str = ""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of (seed, position): two rounds of the SplitMix64 finaliser."""
    x = _mix((seed & _MASK) + 0x9E3779B97F4A7C15)
    x = _mix((x ^ (position & _MASK)) + 0x9E3779B97F4A7C15)
    return (x >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def log_softmax(logits: Row) -> Row:
    """Natural-log probabilities of each row of [..., V]; a row's are those that it has alone."""
    shifted: Row = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def is_greedy(sampling: Sampling) -> bool:
    """Whether the likeliest token is taken, the first of equals."""
    return sampling.temperature < GREEDY_BELOW


def choose(logits: Row, sampling: Sampling, position: int) -> int:
    """The token for `position` (that of the new token) under temperature, top-k, min-p and top-p, in this order."""
    if is_greedy(sampling):
        return int(logits.argmax())
    scaled = logits / sampling.temperature
    # Values alone are sorted, which takes a tenth of sorting them with their tokens: equals are kept apart at the end.
    order = -scaled
    if 0 < sampling.top_k < order.size:
        order = np.partition(order, sampling.top_k - 1)[: sampling.top_k]
    order.sort()
    weights = np.exp(order[0] - order)
    weights = weights[weights >= max(sampling.min_p, _TINY)]  # they descend
    cumulative = np.cumsum(weights)
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1], side="left")) + 1
        cumulative = cumulative[:kept]
    draw = uniform(sampling.seed, position) * cumulative[-1]
    index = min(int(np.searchsorted(cumulative, draw, side="right")), cumulative.size - 1)
    equals = np.flatnonzero(scaled == -order[index])  # by token id
    return int(equals[index - np.searchsorted(order, order[index], side="left")])


def logprobs_of(logits: Row, tokens: Sequence[int], wanted: Sequence[int]) -> Iterator[TokenLogprobs]:
    """Before temperature, of each row of `logits` [S, V]: the log probability of its token, and of its `wanted` best.

    Rows together, as calls of numpy cost more than what they compute where a vocabulary is small.
    """
    logs = log_softmax(logits)
    chosen = logs[np.arange(len(logs)), tokens]
    as_likely = logs >= chosen[:, None]
    for row, mine, places, count in zip(logs, chosen.tolist(), as_likely, wanted, strict=True):
        rank = int(np.count_nonzero(places))  # row by row: with an axis it converts them all first
        yield TokenLogprobs(_sayable(mine), _best(row, min(count, row.size)) if count > 0 else [], rank)


def _best(logs: Row, count: int) -> list[tuple[int, float]]:
    best = np.argpartition(-logs, count - 1)[:count]
    best = best[np.lexsort((best, -logs[best]))]
    return [(int(token), _sayable(float(logs[token]))) for token in best]


def _sayable(log: float) -> float:
    """As a number that JSON has; what is no number stays none."""
    return LEAST_LOGPROB if log == -math.inf else log


def scores_of(logits: Tensor, score: Score) -> Iterator[TokenLogprobs]:
    """The log probabilities of the targets, of which each row of `logits` [S, V] has one.

    RequestError if a row has none, as where such a row should give a token.
    """
    for part, rows in _on_host(logits, range(len(score.targets))):
        if not np.isfinite(rows.max(axis=-1)).all():
            raise RequestError(NO_NUMBERS)
        yield from logprobs_of(rows, [score.targets[at] for at in part], [score.top] * len(part))


def sample(
    logits: Tensor,
    settings: Sequence[Sampling],
    positions: Sequence[int],
    histories: Sequence[History | None] | None = None,
    grammars: Grammars | None = None,
) -> list[Drawn]:
    """One token per row of `logits` [S, V]; `positions[i]` is where row i's new token will stand.

    `histories`: the tokens before it, of the rows whose logits are shaped.
    """
    histories = histories or [None] * len(settings)
    drawn = [Drawn(NO_TOKEN)] * len(settings)
    plain = [row for row, each in enumerate(settings) if _is_plain(each)]
    for row, each in zip(plain, _likeliest(logits, plain), strict=True):
        drawn[row] = each
    for part, rows in _on_host(logits, [row for row, each in enumerate(settings) if not _is_plain(each)]):
        asked = [(settings[row], positions[row], histories[row]) for row in part]
        for row, each in zip(part, _drawn(rows, asked, grammars), strict=True):
            drawn[row] = each
    return drawn


def _likeliest(logits: Tensor, rows: Sequence[int]) -> list[Drawn]:
    """These rows' likeliest tokens, or an error of that row alone: the largest of logits with no number among them is
    none."""
    if not rows:
        return []
    picked = _picked(logits, rows)
    tokens = picked.argmax(dim=-1, keepdim=True)
    found = torch.cat((tokens.double(), picked.gather(1, tokens).double()), 1).tolist()  # in one copy, see `_on_host`
    return [Drawn(int(t)) if math.isfinite(best) else Drawn(NO_TOKEN, error=NO_NUMBERS) for t, best in found]


def _drawn(
    logits: Row, asked: Sequence[tuple[Sampling, int, History | None]], grammars: Grammars | None
) -> list[Drawn]:
    """A token per row [S, V], and its log probabilities where they are wanted."""
    best = logits.argmax(axis=1)
    likeliest, numbers = best.tolist(), np.isfinite(logits[np.arange(len(logits)), best]).tolist()
    drawn: list[Drawn] = []
    for at, (sampling, position, history) in enumerate(asked):
        if not numbers[at]:
            drawn.append(Drawn(NO_TOKEN, error=NO_NUMBERS))
            continue
        if sampling.shaping is None and is_greedy(sampling):
            drawn.append(Drawn(likeliest[at]))
            continue
        try:
            shaped = _shaped(logits[at], sampling, history, grammars)
        except RequestError as error:  # of this request alone: the other rows' tokens count
            drawn.append(Drawn(NO_TOKEN, error=str(error)))
            continue
        token = choose(shaped, sampling, position)
        drawn.append(Drawn(token))
    wanted = [at for at, (sampling, _, _) in enumerate(asked) if sampling.logprobs >= 0 and not drawn[at].error]
    if wanted:
        rows = logits if len(wanted) == len(logits) else logits[wanted]
        tokens, counts = [drawn[at].token for at in wanted], [asked[at][0].logprobs for at in wanted]
        for at, found in zip(wanted, logprobs_of(rows, tokens, counts), strict=True):
            drawn[at] = Drawn(drawn[at].token, found)
    return drawn


def _is_plain(sampling: Sampling) -> bool:
    """Whether nothing but the likeliest token is wanted."""
    return is_greedy(sampling) and sampling.logprobs < 0 and sampling.shaping is None


def _picked(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[list(rows)]


def _on_host(logits: Tensor, rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Row]]:
    """These rows, in one copy, as on a device each copy is a wait; then as many at a time as the caches hold."""
    if not rows:
        return
    values, at_once = _picked(logits, rows).double().cpu().numpy(), max(1, TOGETHER // logits.shape[1])
    for first in range(0, len(rows), at_once):
        yield rows[first : first + at_once], values[first : first + at_once]


def _shaped(logits: Row, sampling: Sampling, history: History | None, grammars: Grammars | None) -> Row:
    shaping, history = sampling.shaping, history or History()
    if shaping is None:
        return logits
    known = np.frombuffer(history.tokens, np.uint32)
    if shaping.grammar:
        if grammars is None:
            raise ModelError("a grammar is asked for where none can be read")
        allowed = grammars.allowed(shaping.grammar, known[history.prompt :], logits.size)
        logits = np.where(allowed, logits, -np.inf)
    return shape(logits, shaping, known, history.prompt)
