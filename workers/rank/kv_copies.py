"""A rank's half of a move of KV blocks: out to a peer, in from one, or in from the pool that a dead rank has left."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from workers.protocol.messages import CopyBlocks
from workers.rank.left_pools import LeftPools

if TYPE_CHECKING:
    from workers.exchange.loop import Exchange
    from workers.model.runner import ModelRunner


def copied(order: CopyBlocks, runner: ModelRunner, exchange: Exchange, pools: LeftPools) -> int:
    """Do it; how many blocks, from the first on. What is written out is the target's once it was posted."""
    if order.there:
        return pools.read(runner, order)
    stamp = (order.engine_token, order.copy)
    if order.arriving:
        return runner.take_in(order.blocks, exchange.inbox(order.source), stamp)
    return runner.write_out(order.blocks, partial(exchange.outbox, order.target), stamp)
