"""The engine's hold on all ranks: one queue to them, one from each, their death notices and the live mask.

No wait is for a rank that is gone, and each has a deadline. Joining runs in a thread of its own. A dead rank's queue
ends with its process. A rank that neither answers nor dies is evicted: soon if it is seen to do nothing
(`watchdog.py`), else at the step deadline, which is longer while its heartbeat counter rises (a busy machine is slow).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec
import structlog

from membership.base import failpoints
from membership.base.attempts import Attempts
from membership.base.enums import DetectedBy
from membership.base.errors import ElasticError, QueueClosed, QueueSilent, WaitTimeout
from membership.base.network import Network
from membership.base.process_stats import threads
from membership.base.rank_id import RankId
from membership.base.timing import STEP_DEADLINE_S
from membership.store.records import AgentRecord, ClusterState, RankRecord
from workers.fleet.notices import Notices
from workers.fleet.pace import Pace
from workers.fleet.watchdog import Look, Watchdog
from workers.ipc.doorbell import Doorbell
from workers.protocol import step_fence
from workers.protocol.far_link import FarLink
from workers.protocol.live_mask import LiveMask
from workers.protocol.liveness import DeathWatcher, LivenessPage
from workers.protocol.messages import (
    CopyBlocks,
    EngineMessage,
    Farewell,
    Ping,
    RankMessage,
    StepBatch,
    StepResult,
    reader_id,
)
from workers.queue.handle import Handle, this_host
from workers.queue.message_queue import MessageQueue, MsgpackCodec, SlowReaders
from workers.queue.network import keys_for, refusing_retired, remote_of
from workers.queue.silence import OtherHosts

MAX_OWED_PINGS = 8  # a stopped rank's queue is not to be filled with them
BEATING_FACTOR = 3.0  # x the deadline, for a rank whose interpreter runs
JOIN_TIMEOUT_S = 5.0
RETRY_S = 0.5
CERTAIN = frozenset({DetectedBy.ROBUST_FUTEX, DetectedBy.PIDFD})  # the kernel's word

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class RankJoined:
    """The rank has answered on its queues: it can be used."""

    rank_id: RankId


@dataclass(frozen=True)
class RankLost:
    """The rank is gone or given up; nothing more will come from it. `at` is on the monotonic clock."""

    rank_id: RankId
    source: DetectedBy
    at: float
    silent_s: float = 0.0  # how long it had owed an answer by then, if that was the sign
    ended: bool = False  # whether its process has certainly ended: it writes nothing any more


FleetEvent = RankMessage | RankJoined | RankLost


@dataclass(eq=False)
class _Link:
    """One rank, attached. `page` None: it is on another host, and its connection and its agent tell of its death."""

    key: RankId
    answers: MessageQueue
    page: LivenessPage | None
    resources: ExitStack
    joined: bool = False
    owed: dict[int, float] = field(default_factory=dict)  # step or ping not answered yet -> when it was sent
    heartbeats: int = 0  # of the rank, when it last owed nothing

    def owe(self, step: int, now: float) -> None:
        """It was asked something."""
        if not self.owed and self.page is not None:
            self.heartbeats = self.page.heartbeats
        self.owed[step] = now

    def excuse(self, now: float) -> None:
        """A rank that loads owes no ping yet: its agent watches it, and ends it if nothing advances."""
        if self.owed and max(self.owed) < 0 and self.page is not None and self.page.load.loading:
            self.owed = dict.fromkeys(self.owed, now)

    def look(self) -> Look | None:
        """What it does at this moment; None if it is gone, or cannot be seen from here."""
        page = self.page
        if page is None or (seen := threads(page.pid)) is None:
            return None
        return Look(seen.state, seen.main_s, seen.others_run, seen.all_s, page.heartbeats, page.steps, page.turns)

    def due(self, deadline_s: float) -> float:
        """When its answer is overdue; infinity if it owes none."""
        if not self.owed:
            return math.inf
        beating = self.page is None or self.page.heartbeats > self.heartbeats + 1
        return min(self.owed.values()) + deadline_s * (BEATING_FACTOR if beating else 1.0)


class Fleet:
    """Made before the election; `open(token)` after it. All but `ring` belongs to the engine's thread."""

    def __init__(
        self,
        step_deadline_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        parts: tuple[Doorbell, MessageQueue, LiveMask] | None = None,
        network: Network | None = None,
    ) -> None:
        """`parts` replace its own; then it has no thread either, and the caller runs `join_wanted`. `network`: it has
        ranks on other hosts, too.
        """
        self._clock = clock
        self._network = network
        self._others = OtherHosts()
        self._here = this_host()
        self._step_deadline_s = STEP_DEADLINE_S if step_deadline_s is None else step_deadline_s
        self._doorbell, self._steps, self._mask = parts or (
            Doorbell(),
            MessageQueue("engine-steps", MsgpackCodec(EngineMessage), remote=remote_of(network) if network else None),
            LiveMask.create(),
        )
        self._notices = Notices(self._doorbell, clock, lambda: self._wake.set())
        self._watchdog = Watchdog()
        self._pace = Pace(clock())
        self._members: frozenset[RankId] = frozenset()
        self._token = 0
        self._pings = 0
        self._links: dict[RankId, _Link] = {}
        self._known: set[RankId] = set()  # attached, or on the way there
        self._wanted: dict[RankId, RankRecord] = {}  # to be joined; shared with the joining thread, under the lock
        self._lock = threading.Lock()
        self._joined: deque[_Link] = deque()  # joined by that thread, not yet taken over
        self._closing: deque[_Link] = deque()  # to be closed by that thread: stopping a watcher takes a moment
        self._deaths: deque[tuple[RankId, DetectedBy, float]] = deque()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._attempts = Attempts("fleet joiner")
        self._joiner = threading.Thread(target=self._run_joiner, name="fleet-joiner", daemon=True)
        if parts is None:
            self._joiner.start()

    @property
    def broadcast_handle(self) -> bytes:
        """What ranks need to join the queue of steps."""
        return self._steps.export_handle().encode()

    @property
    def mask_handle(self) -> bytes:
        """What ranks need to map the live mask."""
        return self._mask.handle()

    @property
    def slow(self) -> dict[int, float]:
        """Ranks far slower than the others, and by what factor."""
        return self._pace.slow

    def far_links(self) -> dict[RankId, FarLink]:
        """Our connections with ranks of other hosts."""
        far = [link for link in self._links.values() if link.page is None] if self._network is not None else []
        seen = [(link.key, link.answers.acks) for link in far]
        return {
            key: FarLink(up=True, rtt_s=acks.rtt_s, sent_bytes=acks.sent_bytes, retransmits=acks.retransmits)
            for key, acks in seen
            if acks is not None
        }

    @property
    def near(self) -> frozenset[RankId]:
        """Ranks of this host: what runs on their GPUs can be called off."""
        return frozenset(key for key, link in self._links.items() if link.page is not None)

    def call_off(self, below: int) -> None:
        """What ranks run together on their GPUs in calls with smaller numbers is over, for all of them."""
        for link in self._links.values():
            if link.page is not None:
                link.page.call_off(below)

    def ring(self) -> None:
        """Wake the engine's thread; from any thread."""
        self._doorbell.ring()

    def open(self, token: int) -> None:
        """Act under this engine token from now on."""
        self._token = token

    def attach(self, record: RankRecord) -> None:
        """Begin to join a rank that has joined our queue; RankJoined follows. Idempotent."""
        key = record.id
        if key in self._known:
            return
        failpoints.hit("engine.before.attach", record.rank)
        self._known.add(key)
        with self._lock:
            self._wanted[key] = record
        self._wake.set()

    def meet(self, agents: Iterable[AgentRecord]) -> None:
        """These live: those of other hosts tell us of their ranks' deaths."""
        far = {agent.node: agent.notices for agent in agents if agent.notices and agent.host != self._here}
        if self._network is not None:
            self._notices.meet(far)

    @property
    def awaited(self) -> frozenset[RankId]:
        """Ranks whose queues are still to be joined."""
        with self._lock:
            return frozenset(self._wanted)

    def detach(self, key: RankId) -> None:
        """Release a rank that is no longer part of the cluster."""
        with self._lock:
            self._wanted.pop(key, None)
        self._drop(key)

    def ended(self, key: RankId) -> bool:
        """Its agent has recorded its exit; from any thread. Whether its loss is on its way now."""
        attached = key in self._links
        if attached:
            self._on_death(key, DetectedBy.AGENT)
        return attached

    def mask(self, rank: int) -> None:
        """Take a rank out of use at once, in the middle of a step too: the Ping wakes all ranks to look at the mask.

        The engine's loop calls it for each rank that this fleet reports as lost.
        """
        self._mask.mask(rank)
        self._ping()

    def adopt(self, masked: Iterable[int], members: Iterable[RankId] = ()) -> None:
        """At a flip, between two steps: exactly these ranks of the new view are masked."""
        self._mask.reset(masked)
        self._members = frozenset(members)

    def broadcast(self, message: StepBatch | Ping) -> None:
        """Send to all ranks. Ranks with chunks in the batch owe an answer; to a Ping, each rank does."""
        now = self._clock()
        for key, link in self._links.items():
            if isinstance(message, Ping) or key.rank in message.ranks:
                link.owe(message.step, now)
        if not isinstance(message, Ping):
            self._pace.worked(message.ranks)
            self._watchdog.began(message.step, (key for key in self._links if key.rank in message.ranks), now)
        self._send(message)

    def copy(self, order: CopyBlocks) -> None:
        """Send half of a move of KV blocks. The caller waits for the answer; a hanging rank shows in its steps."""
        self._send(order)

    def _send(self, message: EngineMessage) -> None:
        while True:
            try:
                self._steps.enqueue(message, self._step_deadline_s)
                return
            except SlowReaders as slow:  # they have not read for so long that the queue has no room left
                self._give_up(slow.readers)

    def probe(self) -> None:
        """Have every rank prove that it still answers, unless that is under way for each of them."""
        owed = [sum(step < 0 for step in link.owed) for link in self._links.values()]
        if owed and min(owed) == 0 and max(owed) < MAX_OWED_PINGS:
            self._ping()

    def _ping(self) -> None:
        self._pings += 1
        masked = self._mask.masked()
        self.broadcast(Ping(self._token, -self._pings, [r for r in range(masked.bit_length()) if masked >> r & 1]))

    def collect(self, timeout_s: float, or_when: Callable[[], bool]) -> list[FleetEvent]:
        """Wait until something has happened, or `or_when()`; return what has, answers before their rank's death."""
        due = min((link.due(self._step_deadline_s) for link in self._links.values()), default=math.inf)
        due = min(due, self._watchdog.due)
        self._doorbell.wait(lambda: self._pending() or or_when(), max(0.0, min(timeout_s, due - self._clock())))
        reported, now = self._notices.take(), self._clock()  # first: what a rank had answered before has arrived by now
        happened = [event for link in list(self._links.values()) for event in self._drain(link)]
        happened += [loss for key in reported for loss in self._lose(key, DetectedBy.AGENT, now, ended=True)]
        while self._deaths:
            key, source, at = self._deaths.popleft()
            happened += self._lose(key, source, at)
        happened += self._overdue()
        happened += self._watch()
        self._take_over_joined()
        return happened

    def close(self) -> None:
        """Release all ranks and close the queues."""
        self._stop.set()
        self._wake.set()
        if self._joiner.ident is not None:
            self._joiner.join(timeout=2 * JOIN_TIMEOUT_S)
        if self._joiner.is_alive():
            raise WaitTimeout("the fleet's joining thread did not stop")
        self._take_over_joined()
        for key in list(self._links):
            self._drop(key)
        self._close_dropped()
        self._notices.close()
        self._steps.shutdown()
        self._mask.close()
        self._doorbell.close()

    # ---- the engine's thread

    def _pending(self) -> bool:
        if self._deaths or self._joined or self._notices.pending():
            return True
        return any(link.answers.pending() for link in self._links.values())

    def _drain(self, link: _Link) -> list[FleetEvent]:
        """The rank's messages, and its loss if its queue has ended."""
        events: list[FleetEvent] = []
        try:
            while link.key in self._links and (result := link.answers.try_dequeue()) is not None:
                events += self._answered(link, result)
        except QueueSilent as silent:
            lost = self._lose(link.key, DetectedBy.SILENCE, self._clock())
            events += [replace(loss, silent_s=silent.silent_s) for loss in lost]
        except QueueClosed:
            events += self._lose(link.key, DetectedBy.QUEUE, self._clock())
        return events

    def _answered(self, link: _Link, result: RankMessage) -> list[FleetEvent]:
        if not step_fence.answers(result, link.key, self._token):
            log.warning("foreign_answer_dropped", rank=link.key.rank, token=result.engine_token)
            return []
        if isinstance(result, Farewell):
            self._drop(link.key)  # so the end of its queue is not reported as a loss
        if not isinstance(result, StepResult):
            return [result]
        link.owed.pop(result.step, None)
        if result.step >= 0:
            self._watchdog.answered(link.key, result.step, self._clock())
            return [result]
        if link.joined:
            return []
        link.joined = True
        return [RankJoined(link.key)]

    def _give_up(self, readers: Iterable[str]) -> None:
        late = set(readers)
        for reader in late:
            self._steps.drop_reader(reader)
        self._deaths.extend((key, DetectedBy.DEADLINE, self._clock()) for key in self._links if reader_id(key) in late)

    def _lose(self, key: RankId, source: DetectedBy, at: float, *, ended: bool = False) -> list[RankLost]:
        """`ended`: the kernel of its host has said so."""
        if key not in self._links:
            return []
        page = self._links[key].page
        ended = ended or source in CERTAIN or (page is not None and page.ended)
        self._mask.evict(*key)  # before it sees that it is dropped: if it is alive, it looks there
        self._drop(key)
        return [RankLost(key, source, at, ended=ended)]

    def _overdue(self) -> list[FleetEvent]:
        now = self._clock()
        for link in self._links.values():
            link.excuse(now)
        late = [link for link in self._links.values() if link.due(self._step_deadline_s) <= now]
        silent_s = {link.key: now - min(link.owed.values()) for link in late}
        losses = [loss for link in late for loss in self._lose(link.key, DetectedBy.DEADLINE, now)]
        return [replace(loss, silent_s=silent_s[loss.rank_id]) for loss in losses]

    def _watch(self) -> list[RankLost]:
        """Ranks that keep the step waiting and do nothing. Members without chunks count: peers need their experts."""
        now = self._clock()
        if now >= self._pace.due:
            waited_s = {key.rank: link.page.waited_s for key, link in self._links.items() if link.page is not None}
            self._pace.compare(waited_s, now)
        if now < self._watchdog.due:
            return []
        watched = [link for key, link in self._links.items() if key in self._members or self._watchdog.waits_for(key)]
        looks = {link.key: look for link in watched if (look := link.look()) is not None}
        evicted = self._watchdog.watch(looks, now)
        silent_s = now - self._watchdog.since
        return [replace(loss, silent_s=silent_s) for key, sign in evicted for loss in self._lose(key, sign, now)]

    def _take_over_joined(self) -> None:
        while self._joined:
            link = self._joined.popleft()
            if link.key not in self._known:
                self._close_later(link)  # detached meanwhile
                continue
            self._links[link.key] = link
            self._ping()

    def _drop(self, key: RankId) -> None:
        self._known.discard(key)
        link = self._links.pop(key, None)
        if link is not None:
            self._watchdog.gone(key)
            self._pace.gone(key.rank)
            self._steps.drop_reader(reader_id(key))
            self._close_later(link)

    def _close_later(self, link: _Link) -> None:
        self._closing.append(link)
        self._wake.set()

    # ---- the joining thread

    def _run_joiner(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(timeout=RETRY_S if self._wanted or self._notices.retries else 60.0)
            self._wake.clear()
            self._attempts.run(self.join_wanted)

    def note(self, state: ClusterState) -> None:
        """Which join secrets are retired by now. Called in the mirror's thread."""
        if state.config is not None:
            self._network = refusing_retired(state.config, self._network)

    def join_wanted(self) -> None:
        """Join the wanted ranks that can be joined now; then close the dropped ones, which takes a moment for each."""
        with self._lock:
            wanted = list(self._wanted.items())
        for key, record in wanted:
            try:
                link = self._join(record)
            except (ElasticError, msgspec.MsgspecError, OSError) as error:
                log.warning("rank_queue_not_joined", rank=record.rank, error=str(error))
                continue
            with self._lock:
                still_wanted = self._wanted.pop(key, None) is not None
            if not still_wanted:
                self._leave(link)
                continue
            self._joined.append(link)
            self._doorbell.ring()
        self._close_dropped()
        if self._network is not None:  # after the ranks
            self._notices.join(f"engine-{self._token}", self._network)

    def _close_dropped(self) -> None:
        while self._closing:
            self._leave(self._closing.popleft())

    def _leave(self, link: _Link) -> None:
        """Close what joined us to a rank. A thread of it that does not end in time (on an overloaded machine) is left
        to end by itself: neither the engine nor the next rank waits for it.
        """
        try:
            link.resources.close()
        except WaitTimeout as error:
            log.error("rank_queue_not_closed", rank=link.key.rank, error=str(error))

    def _join(self, record: RankRecord) -> _Link:
        key = record.id
        with ExitStack() as opened:
            reader, codec = f"engine-{self._token}", MsgpackCodec(RankMessage)
            handle = Handle.decode(record.response_handle)
            answers = MessageQueue.create_from_handle(
                handle, reader, self._doorbell, JOIN_TIMEOUT_S, codec, keys_for(handle, self._network)
            )
            opened.enter_context(answers)
            page: LivenessPage | None = None
            if handle.host == this_host():
                page = opened.enter_context(LivenessPage.attach(record.liveness_handle))
                opened.callback(DeathWatcher(page, partial(self._on_death, key)).stop)
            else:
                answers.end_on_silence(self._others)
            return _Link(key, answers, page, opened.pop_all())

    def _on_death(self, key: RankId, source: DetectedBy) -> None:
        """In the thread that noticed it."""
        self._deaths.append((key, source, self._clock()))
        self._doorbell.ring()
