"""What agents of other hosts tell the engine of their ranks' deaths (`workers/agent/death_notices.py`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
import structlog

from membership.base.errors import ElasticError, QueueClosed
from membership.base.network import Network
from membership.base.rank_id import RankId
from workers.ipc.doorbell import Doorbell
from workers.protocol.death_notice import DeathNotice
from workers.queue.handle import Handle
from workers.queue.message_queue import MessageQueue, MsgpackCodec
from workers.queue.network import keys_for

JOIN_S = 1.0  # shorter than for a rank: ranks wait for the same thread, and can do without this
RETRY_S = 5.0
log = structlog.get_logger(__name__)


class _Source(NamedTuple):
    node: str
    handle: bytes
    queue: MessageQueue


class Notices:
    """The queues of all agents on other hosts. Joined and closed by one thread, read by the engine's."""

    def __init__(self, doorbell: Doorbell, clock: Callable[[], float], wake: Callable[[], object]) -> None:
        """`wake`: the joining thread, which has something to do."""
        self._doorbell, self._clock, self._wake = doorbell, clock, wake
        self._wanted: Mapping[str, bytes] = {}
        self._open: dict[str, _Source] = {}
        self._joined: deque[_Source] = deque()  # by the joining thread, not yet taken over
        self._closing: deque[_Source] = deque()
        self._held: dict[str, bytes] = {}  # the joining thread's: what it has joined, and not closed
        self._again_at: dict[str, float] = {}

    # ---- the engine's thread

    def meet(self, handles: Mapping[str, bytes]) -> None:
        """These agents, by node, tell of deaths."""
        if handles == self._wanted:
            return
        self._wanted = dict(handles)
        for source in list(self._open.values()):
            if handles.get(source.node) != source.handle:
                self._drop(source)
        self._wake()

    def pending(self) -> bool:
        """Whether `take` has something to do."""
        return bool(self._joined) or any(source.queue.pending() for source in self._open.values())

    def take(self) -> list[RankId]:
        """Who has ended."""
        while self._joined:
            source = self._joined.popleft()
            self._open[source.node] = source
            if self._wanted.get(source.node) != source.handle:  # it is another one by now
                self._drop(source)
        found: list[RankId] = []
        for source in list(self._open.values()):
            try:
                while (notice := source.queue.try_dequeue()) is not None:
                    found.append(notice.key)
            except QueueClosed as closed:
                log.info("agent_tells_no_more", node=source.node, reason=str(closed))
                self._drop(source)
        return found

    def _drop(self, source: _Source) -> None:
        del self._open[source.node]
        self._closing.append(source)
        self._wake()

    # ---- the joining thread

    @property
    def retries(self) -> bool:
        """Whether an agent is to be joined, or a queue to be closed, by and by."""
        return bool(self._closing) or any(self._held.get(node) != each for node, each in self._wanted.items())

    def join(self, reader: str, network: Network) -> None:
        """Join those that can be joined now, and close what was dropped."""
        while self._closing:
            gone = self._closing.popleft()
            gone.queue.shutdown()
            if self._held.get(gone.node) == gone.handle:
                del self._held[gone.node]
                self._again_at[gone.node] = self._clock() + RETRY_S
        for node, encoded in self._wanted.items():
            if self._held.get(node) == encoded or self._clock() < self._again_at.get(node, 0.0):
                continue
            try:
                handle = Handle.decode(encoded)
                keys, codec = keys_for(handle, network), MsgpackCodec(DeathNotice)
                queue = MessageQueue.create_from_handle(handle, reader, self._doorbell, JOIN_S, codec, keys)
            except (ElasticError, msgspec.MsgspecError, OSError) as error:
                log.warning("agent_not_joined", node=node, error=str(error))
                self._again_at[node] = self._clock() + RETRY_S
                continue
            self._held[node] = encoded
            self._joined.append(_Source(node, encoded, queue))
            self._doorbell.ring()

    def close(self) -> None:
        """Leave all of them; the joining thread has ended."""
        for source in (*self._open.values(), *self._joined, *self._closing):
            source.queue.shutdown()
        self._open.clear()
        self._joined.clear()
        self._closing.clear()
