"""One `dispatch_combine` in progress: which rank computes which pairs, what is answered, and the outputs so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.exchange.batch import ExpertFailed, Work
from workers.exchange.combine import combine
from workers.exchange.link import Link, Tag
from workers.exchange.router import Ints, Parcel, Refused, Router, split
from workers.exchange.rows import DTYPE_CODES, DTYPES, Rows, bits


class Flight(NamedTuple):
    """A request that a peer has not answered yet."""

    link: Link
    tag: Tag
    parcel: Parcel


class Call:
    """Rows of one layer in progress. Pairs are numbered row by row, ascending by expert within a row."""

    def __init__(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """`ids` and `weights` as `ascending` gives them."""
        self.layer = layer
        self.device = hidden.device
        self.dtype = DTYPE_CODES[hidden.dtype]
        self.top_k = weights.shape[1]
        self._weights = weights.cpu()
        self._experts: Ints = ids.cpu().numpy().reshape(-1)
        self.rows: Rows = bits(hidden.detach().cpu().contiguous())
        self._outputs: Rows = np.empty((len(self._experts), hidden.shape[1]), dtype=self.rows.dtype)
        self.own: list[Parcel] = []
        self.queued: dict[int, deque[Parcel]] = {}
        self.flights: dict[int, Flight] = {}
        self.asked = 0  # bits of the ranks that were asked for anything
        self.failed: ExpertFailed | None = None  # why the pairs `redo` must go to a replica
        self.redo: Ints = np.empty(0, dtype=np.int64)
        self.retried = False  # whether rows were sent again to another rank
        self._refused: frozenset[Refused] = frozenset()

    @property
    def key(self) -> tuple[int, int, int]:
        """Requests with the same key can share an expert's call with this one."""
        return self.layer, self.rows.shape[1], self.dtype

    def done(self) -> bool:
        """Whether every pair has its output."""
        return not (self.flights or self.own or self.queued or self.failed)

    def place(self, router: Router, me: int, excluded: int, most_pairs: int, pairs: Ints | None = None) -> None:
        """Choose a rank for all pairs, or again for `pairs`. CoverageLost if an expert has no usable rank."""
        for parcel in router.parcels(self.layer, self._experts, self.top_k, excluded, self._refused, pairs):
            if parcel.rank == me:
                self.own.append(parcel)
            else:
                self.queued.setdefault(parcel.rank, deque()).extend(split(parcel, most_pairs, self.top_k))
                self.asked |= 1 << parcel.rank

    def next_parcel(self, rank: int) -> Parcel:
        """The parcel that goes to `rank` next."""
        queue = self.queued[rank]
        parcel = queue.popleft()
        if not queue:
            del self.queued[rank]
        return parcel

    def forget(self, rank: int) -> tuple[Ints, int]:
        """`rank` will not answer: the pairs it was to compute, and the number of rows that it had been sent."""
        flight = self.flights.pop(rank, None)
        lost = [flight.parcel] if flight else []
        sent = len(flight.parcel.rows) if flight else 0
        lost += self.queued.pop(rank, ())
        return np.concatenate([p.pairs for p in lost]) if lost else np.empty(0, dtype=np.int64), sent

    def refuse(self, rank: int, experts: Iterable[int]) -> None:
        """`rank` does not answer for these experts in this call."""
        self._refused |= {(rank, expert) for expert in experts}

    def take_own(self) -> tuple[list[Work], list[Parcel]]:
        """What this rank has to compute for itself."""
        parcels, self.own = self.own, []
        return [Work(p.experts, p.counts, p.rows[p.row_of], self.rows) for p in parcels], parcels

    def fail_own(self, rank: int, own: list[Parcel], error: ExpertFailed) -> None:
        """`rank`, this one, cannot compute an expert of `own`: all their pairs are to be placed again."""
        self.refuse(rank, [error.expert])
        self.failed = error
        self.redo = np.concatenate([p.pairs for p in own])

    def put(self, parcel: Parcel, outputs: Rows) -> None:
        """Keep the outputs of a parcel's pairs."""
        self._outputs[parcel.pairs] = outputs

    def combined(self) -> Tensor:
        """The weighted sums."""
        dtype = DTYPES[self.dtype][0]
        outputs = torch.from_numpy(self._outputs).view(dtype).view(len(self.rows), self.top_k, -1)
        total = combine(outputs, self._weights, dtype)
        return total if self.device.type == "cpu" else total.to(self.device)
