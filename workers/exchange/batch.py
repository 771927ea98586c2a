"""Run each expert once over the rows of all requests that want it now, so that its weights are read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import structlog
import torch
from torch import Tensor

from membership.base.errors import ModelError, RankFailed
from workers.exchange.model_side import ExpertBank
from workers.exchange.router import Ints
from workers.exchange.rows import DTYPES, Rows, bits

log = structlog.get_logger("exchange")

TOGETHER = 128 * 1024
"""Elements up to which one call for all experts is faster on a CPU; above, intermediate results no longer fit in the
cache. On a GPU one call is always faster: one launch instead of some hundred."""


class Work(NamedTuple):
    """Pairs of one request: the first `counts[0]` are for `experts[0]` and so on; pair i is over `rows[row_of[i]]`."""

    experts: list[int]
    counts: list[int]
    row_of: Ints
    rows: Rows


class ExpertFailed(RankFailed):
    """One expert could not be computed here; the others can."""

    def __init__(self, layer: int, expert: int, why: str) -> None:
        super().__init__(f"layer {layer}, expert {expert}: {why}")
        self.expert = expert


class Outputs(NamedTuple):
    """All outputs, and for each request the places of its pairs in them (None: it is the only one, in its order)."""

    rows: Rows
    places: list[Ints | None]


def run(bank: ExpertBank, layer: int, works: Sequence[Work], dtype: int, device: torch.device) -> Outputs:
    """Compute all pairs of all requests, each expert once. ExpertFailed names the first that cannot be computed."""
    places: list[Ints | None] = [None]
    if len(works) == 1:
        experts, counts, row_of, rows = works[0]
    else:
        (experts, counts, row_of, rows), places = _together(works)
    sizes = [bank.padded(count) for count in counts]
    if sizes != counts:
        row_of, place = _pad(row_of, counts, sizes)
        places = [place if p is None else place[p] for p in places]
    gathered = torch.from_numpy(rows.take(row_of, 0)).view(DTYPES[dtype][0])
    compute = _compute if device.type != "cpu" or gathered.numel() <= TOGETHER else _one_by_one
    whole = compute(bank, layer, experts, sizes, gathered, device)
    return Outputs(bits(whole.contiguous()), places)


def _compute(
    bank: ExpertBank, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor, device: torch.device
) -> Tensor:
    """All experts in one call; one by one if that fails, so that only the failing expert is refused: also if there is
    no room for the rows on the device, where fewer at a time need less."""
    try:
        outputs = bank.compute_many(layer, experts, sizes, rows.to(device)).cpu()
        if outputs.shape != rows.shape or outputs.dtype != rows.dtype:
            raise ModelError(f"{outputs.dtype}{list(outputs.shape)} for {rows.dtype}{list(rows.shape)}")
    except Exception as error:
        if len(experts) == 1:
            raise ExpertFailed(layer, experts[0], repr(error)) from error
        log.warning("experts_failed_together", layer=layer, experts=experts, error=repr(error))
    else:
        return outputs
    return _one_by_one(bank, layer, experts, sizes, rows, device)


def _one_by_one(
    bank: ExpertBank, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor, device: torch.device
) -> Tensor:
    parts = zip(experts, sizes, torch.split_with_sizes(rows, list(sizes)), strict=True)
    return torch.cat([_compute(bank, layer, [expert], [size], part, device) for expert, size, part in parts])


def _together(works: Sequence[Work]) -> tuple[Work, list[Ints | None]]:
    """The pairs of all requests ascending by expert, over the rows of all; and where each request's pairs went."""
    totals: dict[int, int] = {}
    for work in works:
        for expert, count in zip(work.experts, work.counts, strict=True):
            totals[expert] = totals.get(expert, 0) + count
    expert_of = np.concatenate([np.repeat(work.experts, work.counts) for work in works])
    order = expert_of.argsort(kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    row_of, places, rows, pairs = [], list[Ints | None](), 0, 0
    for work in works:
        row_of.append(work.row_of + rows)
        places.append(place[pairs : pairs + len(work.row_of)])
        rows, pairs = rows + len(work.rows), pairs + len(work.row_of)
    experts = sorted(totals)
    together = np.concatenate(row_of)[order]
    return Work(experts, [totals[e] for e in experts], together, np.concatenate([w.rows for w in works])), places


def _pad(row_of: Ints, counts: list[int], sizes: list[int]) -> tuple[Ints, Ints]:
    """Fill each expert's rows up to the size it computes anyway, with row 0: saves a copy. Their outputs are unused."""
    added = np.subtract(sizes, counts)
    place = np.arange(len(row_of)) + (added.cumsum() - added).repeat(counts)
    padded = np.zeros(sum(sizes), dtype=np.int64)
    padded[place] = row_of
    return padded, place
