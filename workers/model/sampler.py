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
    """Natural-log probabilities of one row."""
    shifted = logits - logits.max()
    result: Row = shifted - np.log(np.exp(shifted).sum())
    return result


def is_greedy(sampling: Sampling) -> bool:
    """Whether the likeliest token is taken, the first of equals."""
    return sampling.temperature < GREEDY_BELOW


def choose(logits: Row, sampling: Sampling, position: int) -> int:
    """The token for `position` (that of the new token) under temperature, top-k, min-p and top-p, in this order."""
    if is_greedy(sampling):
        return int(logits.argmax())
    scaled = logits / sampling.temperature
    order = np.argsort(-scaled, kind="stable")  # ties by token id
    if 0 < sampling.top_k < order.size:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights = weights[weights >= max(sampling.min_p, _TINY)]  # they descend
    cumulative = np.cumsum(weights)
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1], side="left")) + 1
        cumulative = cumulative[:kept]
    draw = uniform(sampling.seed, position) * cumulative[-1]
    index = int(np.searchsorted(cumulative, draw, side="right"))
    return int(order[min(index, cumulative.size - 1)])


def logprobs_of(logits: Row, token: int, wanted: int) -> TokenLogprobs:
    """The chosen token's log probability and the `wanted` best ones, before temperature."""
    logs = log_softmax(logits)
    wanted, rank = min(wanted, logs.size), int(np.count_nonzero(logs >= logs[token]))
    if wanted <= 0:
        return TokenLogprobs(float(logs[token]), rank=rank)
    best = np.argpartition(-logs, wanted - 1)[:wanted]
    best = best[np.lexsort((best, -logs[best]))]
    return TokenLogprobs(float(logs[token]), [(int(t), float(logs[t])) for t in best], rank)


def scores_of(logits: Tensor, score: Score) -> Iterator[TokenLogprobs]:
    """The log probabilities of the targets, of which each row of `logits` [S, V] has one."""
    for row, target in zip(logits.double().cpu().numpy(), score.targets, strict=True):
        yield logprobs_of(row, target, score.top)


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
    greedy, sound = _likeliest(logits)
    chosen: list[Drawn] = []
    histories = histories or [None] * len(settings)
    looked_at = [row for row, sampling in enumerate(settings) if not _is_plain(sampling)]
    seen = _on_host(logits, looked_at)
    for row, (sampling, position, history) in enumerate(zip(settings, positions, histories, strict=True)):
        values = None if _is_plain(sampling) else next(seen)
        if not sound[row]:  # of this request alone, as below: the other rows' tokens count
            chosen.append(Drawn(NO_TOKEN, error=NO_NUMBERS))
            continue
        if values is None:
            chosen.append(Drawn(greedy[row]))
            continue
        try:
            shaped = _shaped(values, sampling, history, grammars)
        except RequestError as error:
            chosen.append(Drawn(NO_TOKEN, error=str(error)))
            continue
        token = choose(shaped, sampling, position)
        chosen.append(Drawn(token, logprobs_of(values, token, sampling.logprobs) if sampling.logprobs >= 0 else None))
    return chosen


def _likeliest(logits: Tensor) -> tuple[list[int], list[bool]]:
    """Each row's likeliest token, and whether it is one: the largest of logits with no number among them is none."""
    tokens = logits.argmax(dim=-1, keepdim=True)
    found = torch.cat((tokens.double(), logits.gather(1, tokens).double()), 1).tolist()  # in one copy, see `_on_host`
    return [int(token) for token, _ in found], [math.isfinite(best) for _, best in found]


def _is_plain(sampling: Sampling) -> bool:
    """Whether nothing but the likeliest token is wanted."""
    return is_greedy(sampling) and sampling.logprobs < 0 and sampling.shaping is None


def _on_host(logits: Tensor, rows: Sequence[int]) -> Iterator[Row]:
    """These rows, in one copy: on a device each copy is a wait."""
    if rows:
        picked = logits if len(rows) == len(logits) else logits[list(rows)]
        yield from picked.double().cpu().numpy()


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
