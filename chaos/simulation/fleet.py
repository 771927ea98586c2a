"""The engine's fleet as shipped, over simulated queues, with a check of each eviction."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

from chaos.simulation.exchange import SimMask
from chaos.simulation.invariants import require
from chaos.simulation.rank import Inbox, Outbox, RankProcess
from membership.base.enums import DetectedBy
from membership.base.errors import QueueClosed, WaitTimeout
from membership.base.rank_id import RankId
from membership.base.timing import LINK_SUSPECT_MIN_S, REMOTE_SILENCE_S
from membership.store.records import RankRecord
from workers.fleet.fleet import Fleet, RankLost, _Link
from workers.fleet.watchdog import Look
from workers.protocol.messages import reader_id

if TYPE_CHECKING:
    from chaos.simulation.engine import EngineProcess

JOIN_S, RETRY_S = 0.005, 0.5
BY_NETWORK = frozenset({DetectedBy.SILENCE, DetectedBy.QUEUE, DetectedBy.DEADLINE})  # what a cut looks like


class Bell:
    """Wakes the engine. Nothing sleeps on it."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self.ring = ring

    def wait(self, until: Callable[[], bool], timeout_s: float) -> None:
        """Returns at once: the engine's turn is over soon, and it is called again."""

    def set(self) -> None:
        """As an event that wakes a thread."""
        self.ring()

    def close(self) -> None:
        """Nothing is mapped."""


class Broadcast:
    """The engine's queue to all ranks. It is also its own handle."""

    def __init__(self, process: EngineProcess, name: bytes) -> None:
        self.name = name
        self._process = process
        self._readers: dict[str, Inbox] = {}

    def export_handle(self) -> Broadcast:
        return self

    def encode(self) -> bytes:
        return self.name

    def join(self, rank: RankProcess) -> Inbox:
        inbox = self._readers[reader_id(rank.key)] = Inbox(rank, self._process)
        return inbox

    @property
    def at(self) -> str:
        """The host of the engine."""
        return self._process.at

    def enqueue(self, message: Any, timeout_s: float) -> None:
        """To all readers, each with its own delay."""
        for inbox in self._readers.values():
            inbox.deliver(message, self._process.cluster.delay())

    def drop_reader(self, reader: str) -> None:
        inbox = self._readers.pop(reader, None)
        if inbox is not None:
            inbox.close("dropped by the engine")

    def shutdown(self) -> None:
        for inbox in self._readers.values():
            inbox.close("the engine is gone")
        self._readers.clear()


class SimNotices:
    """What agents of other hosts report of their ranks' deaths: see workers/fleet/notices.py."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._keys: list[RankId] = []

    def arrived(self, key: RankId) -> None:
        """A rank has ended."""
        self._keys.append(key)
        self._ring()

    def pending(self) -> bool:
        return bool(self._keys)

    def take(self) -> list[RankId]:
        keys, self._keys = self._keys, []
        return keys


class Link(_Link):
    """A rank, attached."""

    def look(self) -> Look | None:
        rank = cast(RankProcess | None, self.page)
        return rank.look() if rank is not None and rank.alive else None


class SimFleet(Fleet):
    """See workers/fleet/fleet.py."""

    def __init__(self, process: EngineProcess, number: int) -> None:
        self._process = process
        self.bell, self.steps = Bell(process.wake_now), Broadcast(process, b"steps-%d" % number)
        self.mask_page = SimMask(b"mask-%d" % number)
        super().__init__(clock=process.clock, parts=(cast(Any, self.bell), cast(Any, self.steps), self.mask_page))
        self._wake = cast(Any, Bell(self._join_soon))
        self.reported = SimNotices(process.wake_now)
        self._notices = cast(Any, self.reported)

    def on_death(self, key: RankId) -> None:
        """The kernel released the robust futex of a rank."""
        self._on_death(key, DetectedBy.ROBUST_FUTEX)

    def detach(self, key: RankId) -> None:
        """See Fleet. A live rank that is assigned must not be detached: it would never come back."""
        alive = key in self._process.cluster.ranks
        require(
            not (alive and self._assigned(key)), f"the engine detaches rank {key.rank}, which is alive and assigned"
        )
        super().detach(key)

    def _assigned(self, key: RankId) -> bool:
        assignments = self._process.cluster.store.state.assignments.values()
        return any(spec.id == key for assignment in assignments for spec in assignment.ranks)

    def _join_soon(self) -> None:
        self._process.after(JOIN_S, self._join_all)

    def _join_all(self) -> None:
        self.join_wanted()
        if self._wanted:
            self._process.after(RETRY_S, self._join_all)

    def _join(self, record: RankRecord) -> _Link:
        cluster = self._process.cluster
        answers = cluster.outboxes.get(record.response_handle)
        if answers is None or answers.left or not answers.rank.alive:
            raise QueueClosed(f"rank {record.rank} is gone, or has left")
        answers.ring = self._doorbell.ring
        opened, near = ExitStack(), answers.rank.at == self._process.at
        if not near:
            if not cluster.network.connected(self._process.at, answers.rank.at):
                raise WaitTimeout(f"rank {record.rank} did not admit us")
            opened.callback(answers.end_on_silence(self._process, self._others).stop)
        return Link(answers.rank.key, cast(Any, answers), cast(Any, answers.rank if near else None), opened)

    def _lose(self, key: RankId, source: DetectedBy, at: float, *, ended: bool = False) -> list[RankLost]:
        rank = self._process.cluster.ranks.get(key)
        if rank is not None and key in self._links:
            ill = rank.stopped or rank.ill_until > self._clock() - 1.0
            released = source is DetectedBy.QUEUE and not self._assigned(key)  # as its agent asked
            cut = source in BY_NETWORK and self._network_troubled(rank.at)
            require(ill or released or cut, f"rank {key[0]} beats and advances, and was evicted: {source}")
            if source is DetectedBy.SILENCE:
                self._require_not_ours(key, rank.at)
        return super()._lose(key, source, at, ended=ended)

    def _network_troubled(self, host: str) -> bool:
        """Whether that host, or an acknowledgement of it, did not get through lately."""
        return self._process.cluster.network.troubled(self._process.at, host, REMOTE_SILENCE_S + 1.0)

    def _require_not_ours(self, key: RankId, host: str) -> None:
        """Violation if all other hosts are silent, of two or more, for long enough to be seen: it is ours that is cut
        off. That they are all gone is believed only after a time without messages.
        """
        process, now = self._process, self._clock()
        waits: dict[str, list[float]] = {}
        for answers in (cast(Outbox, link.answers) for link in self._links.values() if link.page is None):
            if answers.watch is not None:
                waits.setdefault(answers.rank.at, []).append(answers.watch.connection.waited_s(now))
        ours = len(waits) > 1 and all(min(each) >= LINK_SUSPECT_MIN_S for each in waits.values())
        believed = process.cluster.network.cut_s(host, process.at) > REMOTE_SILENCE_S or process.ill_until > now - 1.0
        require(not ours or believed, f"rank {key.rank} is given up by an engine that is cut off itself")
