"""Tells engines on other hosts that a rank has ended, in the thread that finds it, and past the store: an exit record
takes a write to disk and several turns of threads. The record comes all the same; the later of both changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from membership.base.attempts import is_shortage
from membership.base.errors import ConfigError, QueueError
from membership.base.network import Network
from membership.base.rank_id import RankId
from workers.protocol.death_notice import DeathNotice
from workers.queue.message_queue import MessageQueue, MsgpackCodec
from workers.queue.network import listening_keys, remote_of

LISTEN_AGAIN_S = 5.0  # after no port was free, or the machine lacked something
log = structlog.get_logger(__name__)


class DeathNotices:
    """Owns the queue that engines on other hosts join."""

    def __init__(self, node: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._node, self._clock = node, clock
        self._queue: MessageQueue | None = None
        self._listens_with, self._again_at = b"", 0.0
        self._handle = b""

    def listen(self, network: Network) -> bytes:
        """How engines join, for the agent's record; empty while no port is free. By one thread. Ranks that serve do not
        depend on it: what is lacking is no error of the caller's.

        With another join secret it listens anew.
        """
        key = listening_keys(network).public
        if key != self._listens_with and self._clock() >= self._again_at:
            try:
                newer = MessageQueue(f"{self._node}-deaths", MsgpackCodec(DeathNotice), remote=remote_of(network))
            except Exception as error:
                self._again_at = self._clock() + LISTEN_AGAIN_S
                if not isinstance(error, ConfigError | QueueError) and not is_shortage(error):
                    raise
                log.warning("deaths_not_reported", error=str(error), hint=getattr(error, "hint", ""))
                return self._handle
            older, self._queue = self._queue, newer
            self._listens_with, self._handle = key, newer.export_handle().encode()
            if older is not None:
                older.shutdown()
        return self._handle

    def tell(self, key: RankId) -> None:
        """This rank has ended. From any thread. The store tells it, too: what is lacking is no error, nor is it waited
        for while an engine that does not read leaves no room.
        """
        queue = self._queue
        if queue is None:
            return
        try:
            queue.enqueue(DeathNotice(*key), timeout_s=0.0)
        except Exception as error:
            if not isinstance(error, QueueError) and not is_shortage(error):
                raise
            log.warning("death_not_reported", rank=key.rank, incarnation=key.incarnation, error=str(error))

    def close(self) -> None:
        """Tell no more."""
        if self._queue is not None:
            self._queue.shutdown()
            self._queue = None
