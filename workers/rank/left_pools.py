"""What this rank reads of dead ranks of its host: their KV pools, which their agent has kept.

A pool in host memory is opened for each read. One on a GPU is mapped, which takes ms, and stays so for the reads that
follow; a mapping keeps the memory, so it is let go once nothing has been read for a while.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import structlog

from membership.base.errors import ElasticError
from membership.base.rank_id import RankId
from membership.base.timing import POOL_MAPPED_S
from workers.protocol.messages import CopyBlocks
from workers.protocol.pool_client import keep, opened

if TYPE_CHECKING:
    from workers.model.runner import ModelRunner

log = structlog.get_logger(__name__)


class Mapped(Protocol):
    """Memory of a GPU, maybe another one, where kernels of ours reach it."""

    @property
    def address(self) -> int:
        """Where."""

    @property
    def size(self) -> int:
        """Bytes."""

    def close(self) -> None:
        """Waits for kernels that use it."""


Map = Callable[[int, int], Mapped]
"""A mapping of the memory behind a descriptor, which stays the caller's, and of this size."""


def map_on(gpu: int) -> Map:
    """For kernels of that GPU; RankFailed if they cannot reach it."""

    def mapped(fd: int, nbytes: int) -> Mapped:
        from workers.exchange.cuda.driver import Mapping

        return Mapping(fd, nbytes, gpu)

    return mapped


def keep_pool(runner: ModelRunner, pools: bytes, rank: int, incarnation: int) -> None:
    """Have the agent keep the cache's memory, if it is on a GPU. Without, its requests would be computed again."""
    lasting = runner.cache.hand_over()
    if lasting.fd < 0:
        return
    try:
        keep(pools, rank, incarnation, *lasting)
    except ElasticError as error:
        log.warning("kv_pool_not_kept", rank=rank, reason=str(error))
    finally:
        os.close(lasting.fd)


class LeftPools:
    """Of one rank process; used by its main thread."""

    def __init__(self, pools: bytes, mapped: Map, clock: Callable[[], float] = time.monotonic) -> None:
        self._pools, self._map, self._clock = pools, mapped, clock
        self._mapped: tuple[RankId, Mapped] | None = None
        self._used_at = 0.0

    def read(self, runner: ModelRunner, order: CopyBlocks) -> int:
        """Read what is ordered; how many blocks, from the first. HandoverRefused, QueueClosed, WaitTimeout, RankError,
        and RankFailed if our GPU cannot reach that memory."""
        if self._mapped is None or self._mapped[0] != order.source:
            with opened(self._pools, order.source) as pool:
                if not pool.nbytes:
                    return runner.read_in(order.blocks, pool.fd, order.there)
                self.close()
                self._mapped = order.source, self._map(*pool)
        self._used_at = self._clock()
        return runner.fetch_in(order.blocks, self._mapped[1], order.there)

    def rest(self) -> None:
        """Let go of what has not been read for a while; called often."""
        if self._mapped is not None and self._clock() - self._used_at > POOL_MAPPED_S:
            self.close()

    def close(self) -> None:
        """Let go."""
        if self._mapped is not None:
            (_, mapped), self._mapped = self._mapped, None
            mapped.close()
