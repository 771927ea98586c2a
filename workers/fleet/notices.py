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
RETRY_S, RETRY_MAX_S = 5.0, 160.0  # twice as long after each attempt that failed: a firewall may stand for good
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
        self._pauses: dict[tuple[str, bytes], tuple[float, float]] = {}  # of agents: the last one, and until when

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
        if self._open:
            self._doorbell.look()  # for all of them at once: this is done for each batch of answers
        for source in [each for each in self._open.values() if each.queue.pending()]:
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
        """Close what was dropped, and join one agent that can be joined now; for a further one `wake`, since ranks may
        wait for this thread.
        """
        while self._closing:
            gone = self._closing.popleft()
            gone.queue.shutdown()
            if self._held.get(gone.node) == gone.handle:
                del self._held[gone.node]
                self._pause(gone.node, gone.handle)
        now, wanted = self._clock(), self._wanted.items()
        self._pauses = {agent: pause for agent, pause in self._pauses.items() if agent in wanted}
        waits = {agent for agent, (_, until) in self._pauses.items() if now < until}
        due = [agent for agent in wanted if agent not in self._held.items() and agent not in waits]
        if due:
            self._join(*due[0], reader, network)
        if len(due) > 1:
            self._wake()

    def _join(self, node: str, encoded: bytes, reader: str, network: Network) -> None:
        try:
            handle = Handle.decode(encoded)
            keys, codec = keys_for(handle, network), MsgpackCodec(DeathNotice)
            queue = MessageQueue.create_from_handle(handle, reader, self._doorbell, JOIN_S, codec, keys)
        except (ElasticError, msgspec.MsgspecError, OSError) as error:
            if (node, encoded) not in self._pauses:
                log.warning("agent_not_joined", node=node, error=str(error))
            return self._pause(node, encoded)
        self._pauses.pop((node, encoded), None)
        self._held[node] = encoded
        self._joined.append(_Source(node, encoded, queue))
        self._doorbell.ring()

    def _pause(self, node: str, encoded: bytes) -> None:
        """Before the next attempt."""
        before, _ = self._pauses.get((node, encoded), (RETRY_S / 2, 0.0))
        pause_s = min(2 * before, RETRY_MAX_S)
        self._pauses[node, encoded] = pause_s, self._clock() + pause_s

    def close(self) -> None:
        """Leave all of them; the joining thread has ended."""
        for source in (*self._open.values(), *self._joined, *self._closing):
            source.queue.shutdown()
        self._open.clear()
        self._joined.clear()
        self._closing.clear()
