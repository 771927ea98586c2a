"""The controller: the elected one reads the cluster's state, and applies what the planner returns, while it leads.

A thin loop. Each write is one `transaction`, in which the store checks that we still lead and that what we replace is
what we read. So a controller that was stopped for a while, or missed a change, changes nothing; and if the answer to a
write is lost, the next state shows whether it took effect.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import structlog
from msgspec.structs import replace

from membership.base import failpoints, loop_watchdog
from membership.base.attempts import is_shortage
from membership.base.errors import Fenced, LeaseLost, StoreReplaced, StoreUnavailable, WaitTimeout
from membership.base.events import EventLog
from membership.base.timing import LEASE_TTL_S
from membership.placement.plan import moves
from membership.planning import planner
from membership.planning.identity import name_of
from membership.planning.own_times import OwnTimes
from membership.planning.planner import Effect
from membership.store.codec import encode
from membership.store.election import Election
from membership.store.interface import Compare, Delete, Get, Op, Put, Store
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from membership.store.records import ClusterConfig, ClusterState, Counter, LeaderRecord, Record

LOOK_S = 0.5  # between two reads of a quiet cluster; a stop is noticed within this
PAUSE_S = 0.2  # after a call that the store did not answer
REMIND_S = 60.0

log = structlog.get_logger(__name__)


def transaction(effect: Effect, state: ClusterState, keys: Keys) -> tuple[list[Compare], list[Op]]:
    """Return the effect as a transaction (without the leader's fence).

    Each key written must be unchanged since `state`: no later revision than the state's. Epochs and incarnations must
    never be given out twice, so views and the counter must be at exactly the known revisions in every transaction: a
    store that was set back to before our last change of them refuses it, even before that is detected. An agent that
    ends takes its assignment away at any moment: then its ranks enter no view, and it is not written again.
    """
    writes: dict[str, Record | None] = {}
    if effect.commit is not None:
        writes[keys.view], writes[keys.next] = effect.commit, None
    if effect.checkpoint is not None:
        writes[keys.checkpoint] = effect.checkpoint
    if effect.unstage and state.next is not None:
        writes[keys.next] = None
    if effect.stage is not None:
        writes[keys.next] = effect.stage
    if effect.incarnation is not None:
        writes[keys.incarnation] = Counter(value=effect.incarnation)
    if effect.desired is not None:
        writes[keys.desired] = effect.desired
    if effect.operation is not None:
        writes[keys.op(effect.operation.id)] = effect.operation
    writes |= {keys.assign(a.node): a for a in effect.assignments}
    known = {
        keys.view: state.view_revision,
        keys.next: state.next_revision,
        keys.incarnation: state.incarnation_revision,
    }
    compares = [Compare(key, "mod", "=", revision) for key, revision in known.items()]
    compares += [Compare(key, "mod", "<", state.revision + 1) for key in writes if key not in known]
    if effect.commit is not None or effect.assignments:
        compares.append(Compare(keys.unassigned, "mod", "<", state.revision + 1))
    return compares, [Delete(key) if record is None else Put(key, encode(record)) for key, record in writes.items()]


def as_written(effect: Effect, state: ClusterState) -> Effect:
    """The effect with its operation's deadline as it was asked for, not as our clock counts it."""
    stored = state.operations.get(effect.operation.id) if effect.operation is not None else None
    if effect.operation is None or stored is None:
        return effect
    return replace(effect, operation=replace(effect.operation, started=stored.started, deadline=stored.deadline))


def edge(effect: Effect) -> str:
    """The name in its failpoints: the phase that an operation enters, else what happens to the view."""
    if effect.operation is not None:
        return effect.operation.phase.value
    if effect.commit is not None:
        return "committed"
    return "staged" if effect.stage is not None else "unstaged" if effect.unstage else "assigned"


def run_controller(
    store: Store,
    cluster: str,
    node: str,
    stop: threading.Event,
    events: EventLog,
    clock: Callable[[], float] = time.time,
    admit: Callable[[ClusterConfig], None] = lambda config: None,
) -> None:
    """Stand by, lead, and stand by again, until `stop` is set. Waits while the store is unavailable.

    `admit` gets the cluster's config first, and raises unless we may work in it. A replaced store ends the work:
    nothing may be decided from other data than the lost ones.
    """
    while not stop.is_set():
        try:
            with Mirror(store, cluster) as mirror:
                if (config := mirror.wait_for_config(stop)) is not None:
                    admit(config)
                times = OwnTimes()
                while not stop.is_set():
                    Term(store, cluster, node, stop, events, clock, mirror, times).serve()
        except StoreReplaced as replaced:
            events.emit("store_replaced", cluster=cluster, error=str(replaced))
            log.error("membership_frozen", cluster=cluster, error=str(replaced), hint=replaced.hint)
            while not stop.wait(REMIND_S):
                log.error("membership_still_frozen", cluster=cluster, error=str(replaced), hint=replaced.hint)
        except Exception as error:
            if not isinstance(error, StoreUnavailable) and not is_shortage(error):
                raise
            log.warning("store_unavailable", cluster=cluster, error=str(error))
            stop.wait(PAUSE_S)


@dataclass(frozen=True)
class Term:
    """One candidacy and, if it wins, the time as leader."""

    store: Store
    cluster: str
    node: str
    stop: threading.Event
    events: EventLog
    clock: Callable[[], float]
    mirror: Mirror
    times: OwnTimes

    @cached_property
    def keys(self) -> Keys:
        """The keys of the cluster."""
        return Keys(self.cluster)

    def serve(self) -> None:
        """Campaign, then lead while the election is held."""
        config = self.mirror.state().config
        value = encode(LeaderRecord(node=self.node, pid=os.getpid()))
        with LeaseKeeper(self.store, config.lease_ttl_s if config else LEASE_TTL_S) as keeper:
            election = Election(self.store, self.keys.leader, value, keeper)
            try:
                with loop_watchdog.watched():
                    self._campaign_and_lead(election)
            except (Fenced, LeaseLost) as error:
                log.warning("controller_stood_down", cluster=self.cluster, error=str(error))
            if election.token:
                fenced = not self.stop.is_set()
                self.events.emit(
                    "leader_left", cluster=self.cluster, node=self.node, token=election.token, fenced=fenced
                )

    def _campaign_and_lead(self, election: Election) -> None:
        while not self.stop.is_set() and not election.token:
            loop_watchdog.heartbeat()
            self.own(self.mirror.state(), self.clock())
            self._campaign(election)
        if election.token:
            self.events.emit("leader_elected", cluster=self.cluster, node=self.node, token=election.token)
        while election.held and not self.stop.is_set():
            loop_watchdog.heartbeat()
            self._reconcile(election)

    def _campaign(self, election: Election) -> None:
        failpoints.hit("controller.before.campaign")
        try:
            election.campaign(LOOK_S)
        except WaitTimeout as error:
            log.debug("another_controller_leads", cluster=self.cluster, error=str(error))

    def _reconcile(self, election: Election) -> None:
        """Reconcile once: apply the effects; if there are none, wait for a change or the next due time."""
        state, now = self.mirror.state(), self.clock()
        effects = self.decide(state, election, now)
        if effects is None:
            self.mirror.poll(state.revision, LOOK_S)
            return
        for effect in effects:
            try:
                written = self.apply(effect, state, election)
            except StoreUnavailable as error:
                log.warning("effect_outcome_unknown", effect=effect.reason, error=str(error))
                self.stop.wait(PAUSE_S)
                return
            self.mirror.poll(max(written - 1, state.revision), LOOK_S)
        if not effects:
            at = planner.due(self.own(state, now), now)
            self.mirror.poll(state.revision, LOOK_S if at is None else min(LOOK_S, at - now))

    def decide(self, state: ClusterState, election: Election, now: float) -> list[Effect] | None:
        """Return the effects; None while the mirror has not seen our election yet. Fenced: another one leads."""
        if state.leader_revision > election.token:
            raise Fenced(f"token {election.token} was superseded by {state.leader_revision}")
        if state.leader_revision != election.token:
            return None
        return [as_written(effect, state) for effect in planner.reconcile(self.own(state, now), now)]

    def own(self, state: ClusterState, now: float) -> ClusterState:
        """`state` as decisions see it: its times on our clock."""
        return self.times.own(state, now)

    def apply(self, effect: Effect, state: ClusterState, election: Election) -> int:
        """Apply one effect; return the revision that the mirror must reach before the next decision."""
        compares, ops = transaction(effect, state, self.keys)
        failpoints.hit(f"controller.before.{edge(effect)}")
        result = self.store.txn([election.fence(), *compares], ops, [Get(self.keys.leader)])
        if result.succeeded:
            failpoints.hit(f"controller.after.{edge(effect)}")
            self._report(effect, state, election.token, result.revision)
            return result.revision
        leader = result.responses[0]
        if isinstance(leader, int) or not leader or leader[0].create_revision != election.token:
            raise Fenced(f"token {election.token} no longer leads cluster {self.cluster}")
        log.info("effect_outdated", cluster=self.cluster, effect=effect.reason)
        return state.revision + 1

    def _report(self, effect: Effect, state: ClusterState, token: int, revision: int) -> None:
        """Write events to the history; a view's with token and revision, so that its commit can be checked later."""
        log.info("effect_applied", cluster=self.cluster, effect=effect.reason)
        operation = effect.operation.id if effect.operation is not None else ""
        for kind, view in (("epoch_committed", effect.commit), ("epoch_staged", effect.stage)):
            if view is not None:
                taken = len(moves(state.view.placement if state.view else {}, view.placement))
                self._emit(
                    kind,
                    effect,
                    epoch=view.epoch,
                    ranks=list(view.ranks),
                    token=token,
                    revision=revision,
                    attempt=view.attempt,
                    operation=operation,
                    experts_taken=taken,
                    weight_bytes=taken * (state.config.expert_bytes if state.config else 0),
                )
        if effect.checkpoint is not None:
            self._emit("checkpoint_known", effect, model=name_of(effect.checkpoint), parts=effect.checkpoint.parts)
        if effect.unstage:
            self._emit("epoch_unstaged", effect, operation=operation)
        if effect.assignments:
            nodes = {a.node: {s.rank: s.incarnation for s in a.ranks} for a in effect.assignments}
            self._emit("ranks_assigned", effect, nodes=nodes)
        if effect.desired is not None and state.desired is not None and effect.desired.ranks != state.desired.ranks:
            self._emit("desired_changed", effect, ranks=effect.desired.ranks)
        if effect.operation is not None:
            op = effect.operation
            fields = {"operation": op.id, "phase": op.phase.value, "target": op.target, "error": op.error}
            self._emit("operation_phase", effect, epoch=op.epoch, **fields)

    def _emit(self, kind: str, effect: Effect, *, epoch: int = 0, **fields: Any) -> None:
        self.events.emit(kind, cluster=self.cluster, epoch=epoch, reason=effect.reason, **fields)
