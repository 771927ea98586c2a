"""Reads what a dead rank had computed for its requests out of the KV pool that it left, so that only the rest is
computed again. Pure.

The pool is its agent's and outlives it. A request that lost its home is given another one as ever. If that is on the
same host, its new rank copies the blocks that it lacks, piece after piece, and the request waits for them. It begins at
once, beside the step that was under way at the death. The next step waits, too, so that the request is in it, but no
longer than that step would take, which is what missing it costs: others go on between two such waits. Only confirmed
tokens are read, and only from a rank whose end is certain. What fails beside the step is asked for once more after it.
Whatever fails else: the request is computed from where it got to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from elastic.engine.kv_blocks import blocks_for
from elastic.engine.migration import Moved
from elastic.engine.sequence import Home, Left, Sequence
from membership.base.rank_id import RankId
from membership.base.timing import COPY_TIMEOUT_S, SALVAGE_WAIT_S
from membership.store.records import ClusterConfig
from workers.protocol.messages import BlocksCopied, CopyBlocks

AT_ONCE = 4  # pieces that a rank is asked for at a time


@dataclass(slots=True, eq=False)
class _Read:
    """One request whose home reads what is left of it."""

    sequence: Sequence
    home: Home
    left: Left
    first: int  # tokens that its home had already
    began: float
    order: CopyBlocks | None = None  # not answered yet
    deadline: float = 0.0
    early: bool = False  # it was ordered beside a step
    in_turn: bool = False  # such an order has failed: the next ones are given between steps


class Salvage:
    """The reads under way, a few at a time per rank."""

    def __init__(self, config: ClusterConfig, engine_token: int, numbers: Iterator[int]) -> None:
        """`numbers`: of copies, none twice under this token."""
        self._on, self._size = config.kv_pools, config.block_size
        self._token, self._numbers = engine_token, numbers
        self._lost: list[Sequence] = []  # that have something left
        self._reads: list[_Read] = []
        self._waiting_since: float | None = None  # the next step, for reads
        self.done: list[Moved] = []  # since the list was last cleared

    @property
    def reading(self) -> frozenset[RankId]:
        """Dead ranks whose pools are still needed."""
        self._lost = [sequence for sequence in self._lost if sequence.left is not None]
        return frozenset(sequence.left.source for sequence in self._lost if sequence.left is not None)

    def lose(self, home: Home, sequence: Sequence) -> None:
        """Its home has certainly ended: note what it leaves, if that is more than an earlier one has left."""
        tokens = sequence.computed if self._on else 0
        if tokens > (sequence.left.tokens if sequence.left is not None else 0):
            blocks = tuple(sequence.blocks[: blocks_for(tokens, self._size)])
            sequence.left = Left(home.rank_id, home.node, blocks, tokens)
            self._lost.append(sequence)

    def promised(self, sequence: Sequence, home: Home) -> int:
        """How many tokens a request without a home would not have to compute there."""
        left = sequence.left
        return left.tokens if left is not None and self._reaches(left, home, sequence) else 0

    def _reaches(self, left: Left, home: Home, sequence: Sequence) -> bool:
        """Whether that home can read it. A prompt whose tokens are to be scored is computed whole."""
        return left.node == home.node and not sequence.unscored

    def begin(self, sequence: Sequence, home: Home, now: float) -> None:
        """A request has a home again."""
        self._reads = [read for read in self._reads if read.sequence is not sequence]
        left = sequence.left
        if left is not None and self.promised(sequence, home) > sequence.computed:
            self._reads.append(_Read(sequence, home, left, sequence.computed, now))
        else:
            sequence.left = None

    @property
    def busy(self) -> bool:
        """Whether any request waits for its blocks."""
        return bool(self._reads)

    def pauses(self, sequence: Sequence) -> bool:
        """Whether it waits for its blocks."""
        return any(read.sequence is sequence for read in self._reads)

    def wait_s(self, now: float, step_s: float) -> float:
        """How long the next step waits for answers to reads at most; it would take `step_s`."""
        if not any(read.order for read in self._reads):
            return 0.0
        if self._waiting_since is None:
            self._waiting_since = now
        return self._waiting_since + max(step_s, SALVAGE_WAIT_S) - now

    def stepped(self) -> None:
        """A step has begun: the next one may wait again."""
        self._waiting_since = None

    def review(self, homes: Mapping[int, Home], now: float) -> None:
        """Drop reads for requests that have lost that home too, and give up those that are not answered."""
        self._reads = [
            read for read in self._reads if read.sequence.home is read.home and homes.get(read.home.rank) is read.home
        ]
        for read in self._reads.copy():
            if read.order is not None and now >= read.deadline:
                self._give_up(read)

    def orders(
        self, homes: Mapping[int, Home], now: float, *, amid: bool = False, writing: Container[int] = ()
    ) -> list[CopyBlocks]:
        """What ranks are to read now, before the next step; `amid`: beside one, whose end may be what an answer waits
        for. Nothing that this step writes may be read into: `writing` are the ranks where it might be."""
        self.review(homes, now)
        for read in self._reads:
            if read.deadline == math.inf and not amid:
                read.deadline = now + COPY_TIMEOUT_S
        under_way = Counter(read.home.rank for read in self._reads if read.order is not None)
        made = []
        for read in self._reads:
            if read.home.rank in writing or (amid and read.in_turn):
                continue
            if read.order is None and under_way[read.home.rank] < AT_ONCE:
                under_way[read.home.rank] += 1
                read.early = amid
                read.order, read.deadline = self._order(read), math.inf if amid else now + COPY_TIMEOUT_S
                made.append(read.order)
        return made

    def _order(self, read: _Read) -> CopyBlocks:
        first, end = read.sequence.computed // self._size, len(read.left.blocks)
        blocks, there = read.sequence.blocks[first:end], list(read.left.blocks[first:])
        source, target = read.left.source, read.home.rank_id
        return CopyBlocks(self._token, next(self._numbers), source, target, blocks, arriving=True, there=there)

    def take(self, answer: BlocksCopied, homes: Mapping[int, Home], now: float) -> None:
        """Handle an answer; answers to anything but the last order have no effect."""
        self.review(homes, now)
        for read in self._reads:
            order = read.order
            if order is None or (order.copy, order.target) != (answer.copy, answer.rank_id):
                continue
            read.order = None
            if answer.error or not 0 < answer.blocks <= len(order.blocks):
                self._failed(read)
            else:
                read.sequence.advance(min(answer.blocks * self._size, read.left.tokens - read.sequence.computed))
                if answer.blocks == len(order.blocks):
                    self._finish(read, now)
            return

    def _finish(self, read: _Read, now: float) -> None:
        self._reads.remove(read)
        read.sequence.left = None
        tokens, ms = read.sequence.computed - read.first, (now - read.began) * 1000
        request = read.sequence.request.request_id
        self.done.append(Moved(request, read.left.source.rank, read.home.rank, tokens, ms))

    def _failed(self, read: _Read) -> None:
        """So soon after a death its agent may have been busy with that: once more, between steps."""
        if not read.early:
            return self._give_up(read)
        for each in self._alike(read):
            each.in_turn = True

    def _give_up(self, read: _Read) -> None:
        for each in self._alike(read):
            self._reads.remove(each)
            each.sequence.left = None

    def _alike(self, read: _Read) -> list[_Read]:
        """What one request cannot be read from, its home cannot read for others either."""
        return [each for each in self._reads if each.home is read.home and each.left.source == read.left.source]
