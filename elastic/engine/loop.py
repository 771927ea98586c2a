"""The active engine: runs one step of all ranks after the other, through losses of ranks and changes of the view.

The loop decides nothing itself: the scheduler chooses what runs, the fleet sends it, the mirror has the members.
A slow or unavailable store never delays a step. Only a successor ends the service of this process.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Protocol

import structlog

from elastic.engine.adoption import Adoption, absent, adoption, leaving, trigger
from elastic.engine.cut_links import CutLinks
from elastic.engine.expert_load import LoadWindow
from elastic.engine.gateway_server import EngineServer
from elastic.engine.gpu_steps import GpuSteps
from elastic.engine.recovery import Recovery
from elastic.engine.relief import Relief
from elastic.engine.scheduler import Output, Scheduler
from elastic.engine.status_writer import StatusWriter
from elastic.engine.traces import Traces
from elastic.protocol import Abort
from membership.base import failpoints, loop_watchdog
from membership.base.enums import DetectedBy, Trigger
from membership.base.errors import Fenced, SchemaError
from membership.base.events import Event, EventLog
from membership.base.rank_id import RankId
from membership.planning.identity import name_of
from membership.store.mirror import Mirror
from membership.store.records import ClusterConfig, ClusterState, EngineStatus, HostLink
from workers.fleet.fleet import Fleet, FleetEvent, RankJoined, RankLost
from workers.protocol.host_links import HostLinks
from workers.protocol.messages import BlocksCopied, CopyBlocks, Farewell, Holding, StepBatch, StepResult, StepStatus

IDLE_S = 0.5
EXPIRE_EVERY_S = 0.25
PATIENCE_TTLS = 2.0  # for a member without a record: its agent needs one at most to write it again

OURS = RankId(-1, 0)  # the engine, beside ranks
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Peers:
    """What an engine talks to: the store (through mirror and status writer), ranks, gateways, the event history."""

    mirror: Mirror
    fleet: Fleet
    server: EngineServer
    status: StatusWriter
    events: EventLog
    gone: Callable[[Set[RankId]], Set[RankId]] = lambda members: frozenset()
    """Which of these, that have no record, certainly do not listen any more (`unrecorded.py`)."""


class Stop(Protocol):
    """Says when to end: a threading.Event, or the term of an engine."""

    def is_set(self) -> bool:
        """Whether it is time."""


class Engine:
    """One engine's term, under one token."""

    def __init__(
        self,
        config: ClusterConfig,
        token: int,
        peers: Peers,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._token = token
        self._mirror = peers.mirror
        self._fleet = peers.fleet
        self._server = peers.server
        self._status = peers.status
        self._events = peers.events
        self._gone = peers.gone
        self._clock, self._wall = clock, wall
        self._scheduler = Scheduler(config, token, self._clock())
        self._recovery = Recovery()
        self._gpu = GpuSteps(config)
        self._traces = Traces(self._wall)
        self._loads = LoadWindow(config.moe_layers, config.experts, self._clock())
        self._slow: set[int] = set()
        self._cut_links = CutLinks()
        self._host_links = HostLinks()
        self._links_now: dict[str, HostLink] = {}
        self._outbox: list[Output] = []
        self._ready: set[RankId] = set()
        self._lost: set[RankId] = set()
        self._unrecorded = False  # whether the store has no record of a rank in use
        self._membership_changed = True
        self._newer_view_since: tuple[int, float] = (0, 0.0)  # (epoch, when it was first seen)
        self._patient_until = math.inf  # when members of it that have no record are given up
        self._last_step_end: float | None = None  # None: there was nothing to run since
        self._leaving: tuple[int, ...] = ()  # ranks of the view that the next one leaves out
        self._staged_revision = 0  # of that next view, while it is staged
        self._pause_since: float | None = None  # since when a flip has kept tokens waiting
        self._expire_at = 0.0
        self._relief = Relief()
        self._relief_at = -math.inf  # when lost experts were last seen on their way back
        self._step_began: float | None = None  # the first one under the new view
        self._pause_ms = 0.0
        self._outcome = "ok"  # of the step under way
        self._steps: Counter[str] = Counter()  # how many ended how
        self._change: tuple[Trigger | None, float] = (None, 0.0)  # what the view is for, and when it was first seen
        self._flip = (0, 0)  # (previous epoch, requests that lost their home)

    def on_membership(self, state: ClusterState) -> None:
        """The mirror has a new state; called in its thread. A step may wait for a rank that has ended elsewhere."""
        self._report_exits(state)
        self.look_again()

    def look_again(self) -> None:
        """Something about the members is known now; from any thread."""
        self._membership_changed = True
        self._fleet.ring()

    # ---- the loop

    def run(self, stop: Stop) -> None:
        """Serve until stopped; Fenced if replaced."""
        try:
            while not stop.is_set():
                loop_watchdog.heartbeat()
                self.turn()
            self._flush()
        finally:
            self._traces.close()

    def turn(self) -> None:
        """Begin a step, continue the running one, or wait for copies or something to do."""
        if not self._scheduler.unanswered:
            self._take_requests()
            self._follow_membership()
            self._copy(self._scheduler.copies(self._clock()))
            if (wait_s := self._scheduler.copies_wait_s(self._clock())) > 0:
                self._flush()
                self._handle(self._fleet.collect(min(wait_s, IDLE_S), self._has_news))
                return
            batch = self._scheduler.schedule(self._clock())
            if batch is None:
                self._idle()
                self._expire()
                self._report()
                return
            self._begin_step(batch)
        if self._scheduler.unanswered:
            # Members are looked at between steps: what changes there must not wake us again and again until then.
            self._handle(self._fleet.collect(IDLE_S, self._has_requests))
            self._take_requests()
        if not self._scheduler.unanswered:
            self._end_step()

    def _begin_step(self, batch: StepBatch) -> None:
        """Start a step. While ranks compute it, send the last step's tokens, report, and take new requests.

        Nothing that can wait is between two steps: GPUs wait for it there.
        """
        self._outcome = "ok"
        failpoints.hit("engine.before.step")
        self._step_began = self._clock()
        self._recovery.step_began(self._step_began)
        if self._config.gpu_exchange and self._scheduler.view is not None:
            batch = self._gpu.plan(batch, self._scheduler.view, self._fleet.near, self._clock())
            self._scheduler.served_by(rank for rank, chunks in batch.ranks.items() if not chunks)
        self._fleet.broadcast(self._traces.begun(batch))
        self._flush()
        self._expire()
        self._report()
        self._take_requests()

    def _end_step(self) -> None:
        self._steps[self._outcome] += 1
        if self._gpu.ended():
            self._emit("gpu_exchange_used", None)
        self._last_step_end = self._clock()
        self._recovery.step_ended(self._last_step_end)
        self._note_flip(self._last_step_end)
        self._note_recoveries()

    def _idle(self) -> None:
        """Nothing can run: wait for requests, ranks, a view, or the end of a rank's back-off."""
        self._flush()
        self._last_step_end = None
        self._note_flip(self._clock())
        self._note_recoveries()
        self._report()
        retry = self._scheduler.next_retry()
        timeout_s = IDLE_S if retry is None else max(0.0, min(IDLE_S, retry - self._clock()))
        self._handle(self._fleet.collect(timeout_s, self._has_news))

    def _has_requests(self) -> bool:
        return self._server.pending

    def _has_news(self) -> bool:
        return self._has_requests() or self._membership_changed or self._status.fenced

    def _take_requests(self) -> None:
        for message in self._server.take():
            if isinstance(message, Abort):
                self._scheduler.abort(message.request_id)
                self._traces.dropped(message.request_id)
            else:
                if message.taken:  # what is unsent of its earlier submission came of other beginnings
                    self._outbox = [each for each in self._outbox if each.request_id != message.request_id]
                outputs = self._scheduler.submit(message, self._clock())
                self._traces.admitted(message, self._scheduler.number_of(message.request_id))
                self._put(outputs)

    def _put(self, outputs: list[Output]) -> None:
        """Send these with the next flush."""
        self._traces.put(outputs)
        self._outbox += outputs

    def _flush(self) -> None:
        self._server.send(self._outbox)
        self._outbox.clear()

    def _expire(self) -> None:
        now = self._clock()
        if now >= self._expire_at:
            self._expire_at = now + EXPIRE_EVERY_S
            if self._scheduler.held and self._relief_is_near():
                self._relief_at = now
            self._put(self._scheduler.expire(now, self._relief_at))
            if self._unrecorded:
                self._fleet.probe()
            loads = self._loads.due(now, self._wall())
            if loads is not None:
                self._status.publish_loads(loads)
            self._look_at_links()

    def _relief_is_near(self) -> bool:
        """Whether lost experts are on their way. No while the state is unreadable, which was logged."""
        try:
            return self._relief.is_near(self._mirror.state(), self._epoch, self._wall(), self._mirror.staleness_s)
        except SchemaError:
            return False

    def _look_at_links(self) -> None:
        """Take in what our connections with other hosts have carried. Members only: of others the node is not known."""
        members = self._scheduler.view.members if self._scheduler.view is not None else ()
        self._host_links.reported(OURS, self._fleet.far_links(), {member.id: member.node for member in members})
        self._links_now = self._host_links.record()

    def _note_slow(self) -> None:
        """Report ranks that have become far slower than the others, or no longer are."""
        slow = self._fleet.slow
        for rank in slow.keys() - self._slow:
            log.warning("rank_slow", rank=rank, factor=round(slow[rank], 1))
            self._emit("rank_slow", rank, factor=round(slow[rank], 1))
        for rank in self._slow - slow.keys():
            self._emit("rank_slow_no_more", rank)
        self._slow = set(slow)

    def _report(self) -> None:
        self._note_slow()
        scheduler = self._scheduler
        view = scheduler.view
        self._status.update(
            EngineStatus(
                token=self._token,
                epoch=view.epoch if view else 0,
                masked=tuple(sorted(scheduler.masked)),
                uncovered=scheduler.uncovered,
                running=scheduler.running,
                waiting=scheduler.waiting,
                queried_tokens=scheduler.queried_tokens,
                cached_tokens=scheduler.cached_tokens,
                salvaged_tokens=scheduler.salvaged_tokens,
                waiting_tokens=scheduler.waiting_tokens,
                shed=scheduler.shed,
                kv_usage=scheduler.kv_usage,
                preemptions=scheduler.preemptions,
                step=scheduler.step,
                steps=dict(self._steps),
                pause_ms=self._pause_ms,
                slow=tuple(sorted(self._slow)),
                vacated_revision=self._vacated_revision(),
                reading=scheduler.reading,
                links=self._links_now,
                recovering=() if scheduler.held else self._recovery.ranks,
            )
        )

    def _vacated_revision(self) -> int:
        """Revision of the staged view, if it removes ranks and no request of theirs can still be moved; else 0."""
        return self._staged_revision if self._leaving and not self._scheduler.waited_for else 0

    # ---- news from the ranks

    def _handle(self, happened: Iterable[FleetEvent]) -> None:
        for event in happened:
            if isinstance(event, StepResult):
                self._take_result(event)
            elif isinstance(event, BlocksCopied):
                self._copy(self._scheduler.copied(event, self._clock()))
            elif isinstance(event, RankLost):
                self._lose(event)
            elif isinstance(event, Holding):
                self._scheduler.holds(event.rank_id, event.known)
            elif isinstance(event, Farewell):
                raise Fenced(f"engine {self._token} has been replaced: rank {event.rank} follows {event.successor}")
            else:
                self._welcome(event)

    def _copy(self, orders: Iterable[CopyBlocks]) -> None:
        """Have ranks copy KV blocks, and report the requests that have moved, or need not be computed again."""
        for order in orders:
            failpoints.hit("engine.before.copy")
            self._fleet.copy(order)
        moved = [("request_moved", each) for each in self._scheduler.moved()]
        for kind, done in (*moved, *(("request_salvaged", each) for each in self._scheduler.salvaged())):
            event = self._emit(
                kind,
                done.target,
                source=done.source,
                request_id=done.request_id,
                tokens=done.tokens,
                ms=round(done.ms, 3),
            )
            self._traces.moved(done, event)

    def _take_result(self, result: StepResult) -> None:
        if result.status is not StepStatus.OK:
            self._outcome = str(result.status)
            log.warning("step_setback", rank=result.rank, step=result.step, status=result.status)
            self._emit("step_setback", result.rank, status=str(result.status), error=result.error[-2000:])
            self._call_off(self._gpu.answered(result))
            if result.status is StepStatus.APART:
                log.warning("gpu_exchange_off", rank=result.rank, reason=result.error)
                self._emit("gpu_exchange_off", result.rank, reason=result.error)
        self._loads.add(result.load)
        if result.retried_rows:
            self._emit("rows_retried", result.rank, rows=result.retried_rows, answered_at=result.retried_at)
        if result.suspects:
            self._emit("ranks_suspected", result.rank, suspects=result.suspects)
            self._fleet.probe()
        self._note_links(result)
        self._traces.answered(result)
        self._put(self._scheduler.apply(result, self._clock()))

    def _call_off(self, below: int) -> None:
        """End what ranks run together on their GPUs, if there is a number."""
        if below:
            self._fleet.call_off(below)

    def _note_links(self, result: StepResult) -> None:
        """Report links that were cut while we reach both ranks, or that are back."""
        view = self._scheduler.view
        if view is None:
            return
        changes = self._cut_links.answered(result.rank, result.unlinked, self._scheduler.masked)
        if not changes.lost and not changes.back:
            return
        node_of = {member.rank: member.node for member in view.members}
        for kind, peers in (("link_lost", changes.lost), ("link_back", changes.back)):
            for peer in peers:
                nodes = {"node": node_of.get(result.rank, ""), "peer_node": node_of.get(peer, "")}
                log.warning(kind, rank=result.rank, peer=peer, **nodes)
                self._emit(kind, result.rank, peer=peer, **nodes)

    def _welcome(self, joined: RankJoined) -> None:
        self._ready.add(joined.rank_id)
        self._membership_changed = True
        held = self._scheduler.held_by(joined.rank_id)
        self._emit("rank_joined", joined.rank_id.rank, incarnation=joined.rank_id.incarnation, held_blocks=held)

    def _lose(self, loss: RankLost) -> None:
        """Take a rank out of use: first for the survivors in mid-step, then in the scheduler."""
        identity = loss.rank_id
        if loss.source == DetectedBy.SILENCE:
            self._host_links.suspected(identity)
        self._ready.discard(identity)
        self._lost.add(identity)
        self._membership_changed = True
        view = self._scheduler.view
        if view is None or identity not in {member.id for member in view.members}:
            self._emit("rank_left", identity.rank, incarnation=identity.incarnation, source=loss.source)
            return
        self._call_off(self._gpu.failed())  # first: the others wait in their kernels
        self._fleet.mask(identity.rank)
        self._note_recoveries()  # of those before: what leaves now may be what they wait for
        self._flush()  # what it had answered: clients need not wait for the others, nor does it end the recovery
        now = self._clock()
        if loss.source == DetectedBy.DEADLINE:
            self._scheduler.overran()
        moved = self._scheduler.lose_ranks([identity.rank], now, ended=loss.ended)
        self._recovery.lost(identity.rank, loss.at, moved)
        if self._outcome == "ok":
            self._outcome = "rank_lost"  # the survivors' step goes on anyway
        masked_ms = (now - loss.at) * 1000
        log.warning("rank_masked", rank=identity.rank, source=loss.source, requests=len(moved))
        event = self._emit(
            "rank_masked",
            identity.rank,
            incarnation=identity.incarnation,
            token=self._token,
            source=loss.source,
            ms=round(masked_ms, 3),
            silent_ms=round(loss.silent_s * 1000, 3),
            requests=len(moved),
            request_ids=moved,
            uncovered=self._scheduler.uncovered,
            noticed_at=loss.at,
        )
        self._copy(self._scheduler.reads(now))  # now: what they had computed may be there when this step ends
        self._traces.lost(moved, now - loss.at, event, self._epoch)
        self._report()

    def _note_recoveries(self) -> None:
        emitted = (output.request_id for output in self._outbox)
        for recovered in self._recovery.progress(emitted, self._scheduler.knows, self._clock()):
            self._emit(
                "rank_recovered",
                recovered.rank,
                ms=round(recovered.ms, 3),
                requests=recovered.moved,
                steps=recovered.steps,
                in_flight_ms=round(recovered.in_flight_ms, 3),
                wait_ms=round(recovered.wait_ms, 3),
            )

    # ---- news from the store

    def _follow_membership(self) -> None:
        if self._status.fenced:
            raise Fenced(f"engine {self._token} has been replaced")
        since = self._newer_view_since
        now = self._clock()
        overdue = since[0] > 0 and now - since[1] > self._config.launch_deadline_s
        if now >= self._patient_until:
            self._patient_until, self._membership_changed = math.inf, True
        if not self._membership_changed and not overdue:
            return
        self._membership_changed = False
        try:
            state = self._mirror.state()
        except SchemaError as error:  # the next readable state sets `_membership_changed` again
            log.error("cluster_state_unreadable", error=str(error))
            return
        if state.engine_token != self._token:
            raise Fenced(f"engine {self._token} has been replaced by {state.engine_token or 'none yet'}")
        self._attach_ranks(state)
        if self._report_exits(state):
            self._membership_changed = True
            return  # first the loss: what it had computed is read, while a view without it would only lack it
        view = self._scheduler.view
        self._follow_leavers(state)
        self._unrecorded = view is not None and not absent(view, state).isdisjoint(self._ready)
        began = since[1] if state.view is not None and state.view.epoch == since[0] else now
        patience_s = PATIENCE_TTLS * self._config.lease_ttl_s
        patient = now < began + patience_s
        newer = adoption(state, self._epoch, self._ready, self._given_up(state), patient=patient, overdue=overdue)
        if newer is None:
            self._newer_view_since = (0, 0.0)
        elif newer.waiting_for:
            if since[0] != newer.view.epoch:
                self._newer_view_since, self._patient_until = (newer.view.epoch, now), now + patience_s
                log.info("view_waiting", epoch=newer.view.epoch, ranks=newer.waiting_for)
        else:
            self._newer_view_since = (0, 0.0)
            self._adopt(newer, state, began)

    def _given_up(self, state: ClusterState) -> Set[RankId]:
        """Those that we have lost, and members of the next view without a record that do not listen any more."""
        if state.view is None or state.view.epoch <= self._epoch:
            return self._lost
        return self._lost | self._gone(absent(state.view, state) - self._ready)

    def _follow_leavers(self, state: ClusterState) -> None:
        """Note which ranks leave with the next view: its commit waits until their requests have moved."""
        view, staged = self._scheduler.view, state.next
        self._leaving = leaving(view, state) if view is not None else ()
        self._staged_revision = state.next_revision if staged is not None and staged.epoch == self._epoch + 1 else 0
        self._scheduler.leave(self._leaving)

    @property
    def _epoch(self) -> int:
        return self._scheduler.view.epoch if self._scheduler.view else 0

    def _attach_ranks(self, state: ClusterState) -> None:
        """Attach to the queues of ranks that joined ours; detach from those that no record names any more.

        A missing record proves nothing: its agent's lease ran out, and the agent may write the same record again.
        """
        self._fleet.meet(state.agents.values())
        for identity, record in state.ranks.items():
            if record.engine_token == self._token and identity not in self._lost:
                self._fleet.attach(record)
        named = set(state.ranks) | {m.id for m in (state.view.members if state.view else ())}
        named |= {spec.id for each in state.assignments.values() for spec in each.ranks}
        if self._scheduler.view is not None:
            named |= {member.id for member in self._scheduler.view.members}
        for identity in (self._ready | self._fleet.awaited) - named:
            self._ready.discard(identity)
            self._fleet.detach(identity)
        self._lost &= named

    def _report_exits(self, state: ClusterState) -> bool:
        """Whether any loss is on its way."""
        return any([self._fleet.ended(found.id) for found in state.exits.values()])  # each of them

    def _adopt(self, newer: Adoption, state: ClusterState, seen: float) -> None:
        """Flip to the view, seen at that time: the next batch carries its epoch. Requests of departed ranks continue
        on others."""
        failpoints.hit("engine.before.flip")
        now = self._clock()
        before = self._epoch
        self._change = trigger(newer.view, state, self._scheduler.view), seen
        self._pause_since = self._last_step_end if self._last_step_end is not None else now
        self._step_began = None
        self._fleet.adopt(newer.masked, (member.id for member in newer.view.members))
        moved = self._scheduler.set_view(newer.view, newer.masked, now, name_of(state.checkpoint))
        self._cut_links.adopt(newer.view.ranks)
        log.info("view_adopted", epoch=newer.view.epoch, ranks=newer.view.ranks, masked=newer.masked)
        self._flip = (before, len(moved))
        self._traces.lost(moved, 0.0, None, newer.view.epoch)
        failpoints.hit("engine.after.flip")

    def _note_flip(self, now: float) -> None:
        """The first step under a new view is over, or there is none to run: report the flip's pause."""
        if self._pause_since is None:
            return
        self._pause_ms = round((now - self._pause_since) * 1000, 3)
        self._pause_since = None
        (before, moved), (change, seen) = self._flip, self._change
        step_s = now - self._step_began if self._step_began is not None else 0.0  # of the pause
        took = {"trigger": change, "committed_ms": round((now - seen) * 1000, 3), "step_ms": round(step_s * 1000, 3)}
        self._emit("epoch_adopted", None, previous=before, requests=moved, pause_ms=self._pause_ms, **took)

    def _emit(self, kind: str, rank: int | None, **fields: object) -> Event:
        return self._events.emit(kind, cluster=self._config.cluster, epoch=self._epoch, rank=rank, **fields)
