"""Moves requests with their KV blocks off ranks that are about to leave, so that nothing is computed again. Pure.

A move runs between steps, one piece at a time: the source writes blocks out, the target reads them in, and finally the
target becomes the request's home. Full blocks do not change, so the request pauses only for its first piece, which may
be all, and for its last; those that the target has already are not copied. At most one request leaves and one enters a
rank at a time, so a step waits for at most one piece. A failed move leaves the request where it was; if it is still
there when its rank leaves, it is computed again on another rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from elastic.engine.kv_blocks import blocks_for
from elastic.engine.sequence import Home, Sequence
from membership.base.timing import COPY_TIMEOUT_S
from membership.store.records import ClusterConfig
from workers.protocol.messages import BlocksCopied, CopyBlocks


@dataclass(frozen=True)
class Moved:
    """A request has another home, where so many of its tokens need not be computed again."""

    request_id: str
    source: int
    target: int
    tokens: int
    ms: float


@dataclass(slots=True, eq=False)
class _Move:
    """One request on its way. The first `copied` of its blocks are in `blocks`, the target's."""

    sequence: Sequence
    source: Home
    target: Home
    blocks: list[int]
    began: float
    copied: int = 0
    piece: int = sys.maxsize  # how many blocks the source writes out at once; not known before it did
    pausing: bool = True
    order: CopyBlocks | None = None  # not answered yet
    deadline: float = 0.0


class Migration:
    """The moves under way. It takes blocks from and returns them to the homes' pools."""

    def __init__(self, config: ClusterConfig, engine_token: int, numbers: Iterator[int]) -> None:
        """`numbers`: of copies, none twice under this token."""
        self._config = config
        self._token = engine_token
        self._moves: list[_Move] = []
        self._staying: set[int] = set()  # sequences that could not be moved
        self._numbers = numbers
        self.leaving: frozenset[int] = frozenset()  # ranks
        self.moved: list[Moved] = []  # since the list was last cleared

    def leave(self, ranks: Iterable[int]) -> None:
        """These ranks, and no others, are about to leave."""
        leaving = frozenset(ranks)
        if leaving != self.leaving:
            self.leaving = leaving
            self._staying.clear()

    @property
    def busy(self) -> bool:
        """Whether any request is on its way."""
        return bool(self._moves)

    def pauses(self, sequence: Sequence) -> bool:
        """Whether its last blocks are being copied: it must not run meanwhile."""
        return any(move.sequence is sequence and move.pausing for move in self._moves)

    def arriving(self, home: Home) -> int:
        """How many requests are on their way to this home."""
        return sum(move.target is home for move in self._moves)

    def reserved(self, home: Home) -> list[int]:
        """Blocks of this home that wait for what is on its way."""
        return [block for move in self._moves if move.target is home for block in move.blocks]

    def waited_for(self, homes: Mapping[int, Home]) -> set[int]:
        """Leaving ranks with requests that may still be moved."""
        return {
            home.rank
            for home in homes.values()
            if home.rank in self.leaving
            and any(sequence.seq not in self._staying for sequence in home.running)
            and any(other not in self.leaving for other in homes)
        }

    # ---- moves

    def review(self, homes: Mapping[int, Home], now: float) -> None:
        """Give up moves that have become pointless: one end is gone, stays, or does not answer."""
        for move in self._moves.copy():
            there = move.sequence.home is move.source and homes.get(move.target.rank) is move.target
            wanted = move.source.rank in self.leaving and move.target.rank not in self.leaving
            if move.order is not None and now >= move.deadline:
                self._staying.add(move.sequence.seq)
                self._give_up(move)
            elif not there or not wanted:
                self._give_up(move)

    def orders(self, homes: Mapping[int, Home], now: float) -> list[CopyBlocks]:
        """Copies to send to ranks now, before the next step."""
        self.review(homes, now)
        if self.leaving:
            busy = {move.source.rank for move in self._moves}
            for home in [h for h in homes.values() if h.rank in self.leaving and h.rank not in busy]:
                self._begin(home, homes, now)
        return [order for move in self._moves.copy() if move.order is None for order in self._next(move, now)]

    def take(self, answer: BlocksCopied, homes: Mapping[int, Home], now: float) -> list[CopyBlocks]:
        """Handle a copy's answer; answers to anything but the last order have no effect."""
        self.review(homes, now)
        identity = answer.rank_id
        for move in self._moves:
            order = move.order
            if order is None or (order.copy, order.addressee) != (answer.copy, identity):
                continue
            if answer.error or not 0 < answer.blocks <= len(order.blocks):
                self._staying.add(move.sequence.seq)
                self._give_up(move)
                return []
            if order.arriving:
                move.copied += answer.blocks
                return list(self._next(move, now))
            if answer.blocks < len(order.blocks):
                move.piece = answer.blocks
            arrived = move.blocks[move.copied : move.copied + answer.blocks]
            return [self._ask(move, order.copy, arrived, now, arriving=True)]
        return []

    def _begin(self, source: Home, homes: Mapping[int, Home], now: float) -> None:
        """Choose the oldest request that fits somewhere, and take the blocks for it."""
        for sequence in source.running:
            if sequence.failures or sequence.seq in self._staying or sequence.left is not None:
                continue
            size = self._config.block_size
            blocks, full = blocks_for(len(sequence.tokens), size), sequence.names[: sequence.computed // size]
            shared = {home.rank: home.pool.find(full) for home in homes.values()}
            fitting = [
                home
                for home in homes.values()
                if home.rank not in self.leaving
                and home.rank_id not in sequence.failed_on
                and not self.arriving(home)
                and len(home.running) < self._config.max_seqs
                and home.pool.cost(blocks, shared[home.rank]) + len(home.running) <= home.pool.free
            ]
            if fitting:
                target = min(fitting, key=lambda home: _unwelcome(home, source.node))
                there = shared[target.rank]
                taken = target.pool.take(blocks, there)
                self._moves.append(_Move(sequence, source, target, taken, now, copied=len(there)))
                return

    def _next(self, move: _Move, now: float) -> Iterator[CopyBlocks]:
        """Ask for the next piece, once the request has paused if it is the last; or it is done."""
        sequence = move.sequence
        total = blocks_for(sequence.computed, self._config.block_size)
        move.pausing = total - move.copied <= move.piece
        move.order = None
        if move.pausing and any(other is sequence for other, _ in move.source.in_flight):
            return
        if move.copied >= total:
            self._finish(move, now)
        elif self._has_room(move, total):
            end = min(total, move.copied + move.piece)
            yield self._ask(move, next(self._numbers), sequence.blocks[move.copied : end], now, arriving=False)
        else:
            self._give_up(move)

    def _has_room(self, move: _Move, total: int) -> bool:
        """Take the blocks that the request came to need since the move began."""
        missing = total - len(move.blocks)
        if missing > move.target.pool.free:
            return False
        move.blocks += move.target.pool.take(max(0, missing))
        return True

    def _ask(self, move: _Move, copy: int, blocks: list[int], now: float, *, arriving: bool) -> CopyBlocks:
        """Both halves of a copy have the same number."""
        source, target = (home.rank_id for home in (move.source, move.target))
        move.order = CopyBlocks(self._token, copy, source, target, blocks.copy(), arriving)
        move.deadline = now + COPY_TIMEOUT_S
        return move.order

    def _finish(self, move: _Move, now: float) -> None:
        """From here on the target is the request's home, and its blocks at the source are free."""
        sequence = move.sequence
        self._moves.remove(move)
        sequence.move(move.target, move.blocks)
        ms = (now - move.began) * 1000
        request = sequence.request.request_id
        self.moved.append(Moved(request, move.source.rank, move.target.rank, sequence.computed, ms))

    def _give_up(self, move: _Move) -> None:
        self._moves.remove(move)
        move.target.pool.give_back(move.blocks)


def _unwelcome(target: Home, node: str) -> tuple[bool, int, int, int]:
    """The least is chosen: another host only where ours has no room."""
    return target.node != node, len(target.running), target.pool.used, target.rank
