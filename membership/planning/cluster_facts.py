"""Which ranks serve, start or are wanted: the facts that the planner's rules decide from. Pure; no rules in here.

A rank can be alive only while it is assigned. Once the controller has unassigned it, it never counts as alive again,
whatever its records say later. A member is *dead* once its agent reported its exit, the engine masked it, or its node
has another agent. A missing record is not enough: leases of healthy ranks expire, all at once, when the store or a
machine was stalled. The engine probes members directly, so its mask is what counts. A new rank, which none probes, is
lost once its record, or its agent's, has been missing for `RECORD_MISSING_S`: who was only late is back by then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

from membership.base.errors import ConfigError
from membership.base.rank_id import RankId
from membership.base.timing import RECORD_MISSING_S, VACATE_S
from membership.placement.plan import max_ranks_allowed, refusal
from membership.placement.tally import Domain
from membership.planning import identity
from membership.store.phases import before_commit
from membership.store.records import (
    MAX_RANKS,
    Assignment,
    ClusterConfig,
    ClusterState,
    Desired,
    Member,
    Operation,
    RankRecord,
    RankSpec,
    RankState,
    View,
)


@dataclass(frozen=True)
class Newcomer:
    """A rank that is assigned but not in the view. `trouble`: why it can never join it; "" if it can."""

    member: Member
    registered: bool
    trouble: str = ""


@dataclass(frozen=True)
class ClusterFacts:
    """The facts of one cluster state at one time."""

    state: ClusterState
    now: float

    @cached_property
    def config(self) -> ClusterConfig:
        """The cluster's constants."""
        if self.state.config is None:
            raise ConfigError("the cluster has no config")
        return self.state.config

    @cached_property
    def desired(self) -> Desired:
        """What operators (or the number of agents) ask for."""
        return self.state.desired or Desired(ranks=0)

    @cached_property
    def view(self) -> View:
        """The committed view; epoch 0 before the first."""
        return self.state.view or View(epoch=0)

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The view's members in order of rank."""
        return tuple(sorted(self.view.members, key=lambda m: m.rank))

    @cached_property
    def offices(self) -> frozenset[str]:
        """Nodes of the engine in office and of gateways, whose end clients would feel."""
        engine = {self.state.engine.node} if self.state.engine is not None else set()
        return frozenset(engine | {gateway.node for gateway in self.state.gateways.values()})

    @cached_property
    def operation(self) -> Operation | None:
        """The active operation that can still be rolled back, if any."""
        return next((op for op in self._active if before_commit(op)), None)

    @cached_property
    def finishing(self) -> Operation | None:
        """The active operation that is committed but not yet done, if any."""
        return next((op for op in self._active if not before_commit(op)), None)

    @cached_property
    def _active(self) -> list[Operation]:
        return sorted((op for op in self.state.operations.values() if op.active), key=lambda op: (op.started, op.id))

    @cached_property
    def assigned(self) -> dict[int, tuple[str, RankSpec]]:
        """rank -> (node, spec), from the assignments that are addressed to their node's current agent."""
        return {
            spec.rank: (node, spec)
            for node, assignment in sorted(self.state.assignments.items())
            if self.addressed(assignment)
            for spec in assignment.ranks
        }

    def addressed(self, assignment: Assignment) -> bool:
        """Whether the assignment is for the node's current (or last) agent."""
        agent = self.state.agents.get(assignment.node)
        return agent is None or agent.started == assignment.agent_started

    def domains(self, members: Iterable[Member]) -> dict[int, Domain]:
        """rank -> its failure domain."""
        return {member.rank: self.domain(member.node) for member in members}

    def domain(self, node: str) -> Domain:
        """What ends with this node, as its agent says: two agents may be on one machine. Default: it alone."""
        agent = self.state.agents.get(node)
        return Domain(agent.zone, agent.machine or node) if agent is not None else Domain("", node)

    @cached_property
    def leaving(self) -> frozenset[str]:
        """Nodes whose ranks are to move away: their agents ask for it, and some member is alive on another node."""
        asking = {node for node, agent in self.state.agents.items() if agent.leaving}
        return frozenset(asking) if any(m.node not in asking for m in self.alive) else frozenset()

    def record(self, member: Member) -> RankRecord | None:
        """The member's record, as its agent published it."""
        return self.state.ranks.get(member.id)

    @cached_property
    def masked(self) -> frozenset[int]:
        """Ranks of the view that the current engine has masked."""
        status = self.state.engine_status
        current = status is not None and status.token == self.state.engine_token and status.epoch == self.view.epoch
        return frozenset(status.masked) if status is not None and current else frozenset()

    @cached_property
    def alive(self) -> tuple[Member, ...]:
        """Members that are not dead."""
        return tuple(m for m in self.members if self._alive(m))

    def _alive(self, member: Member) -> bool:
        return not self.ended(member) and member.rank not in self.masked

    def ended(self, member: Member) -> bool:
        """Whether it certainly does not run, or must not: its exit is known, or it is no longer assigned."""
        node, spec = self.assigned.get(member.rank, ("", None))
        if spec is None or (node, spec.incarnation) != (member.node, member.incarnation):
            return True
        return self.exited(member)

    def exited(self, member: Member) -> bool:
        """Whether its agent reported its exit."""
        last = self.state.exits.get(member.rank)
        return last is not None and last.incarnation == member.incarnation

    def refused(self, member: Member) -> bool:
        """Whether its agent set it aside because it would compute something else; another slot would not help."""
        return self.exited(member) and self.state.exits[member.rank].refused

    @cached_property
    def newcomers(self) -> dict[int, Newcomer]:
        """Assigned ranks that are not members."""
        known = {m.id for m in self.members}
        return {
            rank: self._newcomer(node, spec) for rank, (node, spec) in self.assigned.items() if spec.id not in known
        }

    def _newcomer(self, node: str, spec: RankSpec) -> Newcomer:
        member = Member(rank=spec.rank, node=node, incarnation=spec.incarnation)
        record = self.record(member)
        registered = record is not None and record.state is not RankState.LAUNCHING
        limit = self.config.launch_deadline_s
        trouble = ""
        if self.exited(member):
            trouble = f"rank {member.rank} died: {self.state.exits[member.rank].reason}"
        elif record is None and (member.id in self.state.missing or node not in self.state.agents):
            why = "its lease ran out" if node in self.state.agents else f"lost with the agent of node {node}"
            since = self.state.missing.get(member.id)
            trouble = f"rank {member.rank}: {why}" if since is None or self.now >= since + RECORD_MISSING_S else ""
        elif not registered and self.now >= spec.launched + limit:
            trouble = f"rank {member.rank} did not register within {limit:g} s of its launch"
        elif record is not None:
            trouble = identity.refusal(self.state, record)
        return Newcomer(member, registered, trouble)

    @cached_property
    def target(self) -> int:
        """The number of ranks to aim for: the desired number, within the cluster's limits."""
        config = self.config
        return max(1, min(self.desired.ranks, config.max_ranks, max_ranks_allowed(config.experts, config.redundancy)))

    @cached_property
    def keep(self) -> tuple[Member, ...]:
        """Live members to keep: the lowest ranks, if there are too many."""
        staying = tuple(m for m in self.alive if m.node not in self.leaving)
        if self._settled:
            return tuple(m for m in staying if m.rank in self.desired.slots)
        return tuple(m for m in staying if m.rank not in self.desired.cordoned)[: self.target]

    @cached_property
    def relieved(self) -> tuple[Member, ...]:
        """Live members on nodes that are leaving."""
        return tuple(m for m in self.alive if m.node in self.leaving)

    @cached_property
    def fill(self) -> tuple[int, ...]:
        """Slots to fill with a new rank: those the operation names, then earlier ones, then the lowest free ones.

        Never a drained slot. An operation avoids quarantined slots; a repair does not.
        """
        kept = {m.rank for m in self.keep}
        if self._settled:
            return tuple(slot for slot in self.desired.slots if slot not in kept)
        barred, named = set(self.desired.cordoned), self.operation.ranks if self.operation is not None else ()
        if self.operation is not None:
            barred |= {rank for rank, last in self.state.exits.items() if last.quarantined}
        most = min(self.target + len(kept) + len(barred), MAX_RANKS)
        order = dict.fromkeys(chain(named, self.desired.slots, range(most)))
        free = (slot for slot in order if slot not in kept | barred)
        return tuple(sorted(islice(free, self.target - len(kept))))

    @cached_property
    def _settled(self) -> bool:
        """Whether the cluster's slots are fixed, and no operation is changing them."""
        return self.operation is None and len(self.desired.slots) == self.target

    @cached_property
    def ready(self) -> tuple[Member, ...]:
        """Wanted newcomers that have registered and may be staged."""
        return tuple(n.member for n in self.coming.values() if n.registered and not n.trouble)

    @cached_property
    def coming(self) -> dict[int, Newcomer]:
        """Newcomers in slots that are to be filled, on nodes that stay."""
        found = {slot: self.newcomers[slot] for slot in self.fill if slot in self.newcomers}
        return {slot: n for slot, n in found.items() if n.member.node not in self.leaving}

    @cached_property
    def flipped(self) -> bool:
        """Whether the engine (if there is one) uses the committed view."""
        status = self.state.engine_status
        if self.state.engine is None:
            return True
        return status is not None and status.token == self.state.engine_token and status.epoch >= self.view.epoch

    @cached_property
    def surplus(self) -> tuple[Member, ...]:
        """Assigned ranks that are no longer wanted."""
        return tuple(n.member for rank, n in sorted(self.newcomers.items()) if rank not in self.coming)

    @cached_property
    def lingering(self) -> tuple[RankId, ...]:
        """Ranks that are out of the view and the assignments but have not ended yet."""
        known = {m.id for m in self.members} | {spec.id for _, spec in self.assigned.values()}
        return tuple(sorted(key for key in self.state.ranks if key not in known))

    @cached_property
    def unprepared(self) -> tuple[Member, ...]:
        """Members of the staged view that have not prepared it yet."""
        staged = self.state.next.members if self.state.next else ()
        revision = self.state.next_revision
        return tuple(m for m in staged if (r := self.record(m)) is None or r.prepared_revision != revision)

    @cached_property
    def vacated_by(self) -> float:
        """When the commit stops waiting for requests to migrate off departing ranks; 0.0 if it need not wait.

        A repair never waits, and no operation waits past its deadline.
        """
        state, status = self.state, self.state.engine_status
        staged = state.next
        if (
            staged is None
            or state.engine is None
            or self.alive != self.members
            or set(self.alive) <= set(staged.members)
        ):
            return 0.0
        if status is not None and (status.token, status.vacated_revision) == (state.engine_token, state.next_revision):
            return 0.0
        limit = staged.staged + min(VACATE_S, self.config.launch_deadline_s / 2)
        return min(limit, self.operation.deadline or limit) if self.operation is not None else limit

    @cached_property
    def failed(self) -> dict[Member, str]:
        """Members of the staged view that failed to prepare it, and why."""
        records = {m: self.record(m) for m in self.unprepared}
        revision = self.state.next_revision
        return {m: r.prepare_error for m, r in records.items() if r is not None and r.failed_revision == revision}


def scale_refusal(config: ClusterConfig, ranks: int) -> str:
    """Return why the cluster cannot have this number of ranks, or "" if it can."""
    if ranks > config.max_ranks:
        return f"{ranks} ranks are more than the {config.max_ranks} that the cluster was started for (--max-ranks)"
    return refusal(config.experts, config.redundancy, ranks)
