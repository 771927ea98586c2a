"""Who serves, who is on the way, who is wanted: the facts that the planner's rules decide from. Pure; no rule in here.

A rank counts as alive for as long as it is assigned: once the controller has taken it out of its node's assignment, it
never counts again, whatever its records say later. A member is *dead* once its agent reported its exit, or the engine
masked it, or its node has another agent now. Missing records never are enough: leases run out of ranks that serve well,
all at once where the store or a machine was held up. The engine, which probes members without a record, knows better.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

from membership.base.errors import ConfigError
from membership.base.timing import VACATE_S
from membership.placement.plan import max_ranks_allowed, refusal
from membership.store.phases import before_commit
from membership.store.records import (
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
    """A rank that is assigned but not in the view. `trouble` says why it will never be; "" if it still may."""

    member: Member
    registered: bool
    trouble: str = ""


@dataclass(frozen=True)
class ClusterFacts:
    """One cluster state, looked at."""

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
        """What is asked for."""
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
    def operation(self) -> Operation | None:
        """The operation that may still be rolled back, if one is under way."""
        return next((op for op in self._active if before_commit(op)), None)

    @cached_property
    def finishing(self) -> Operation | None:
        """The operation that is committed and not yet done, if any."""
        return next((op for op in self._active if not before_commit(op)), None)

    @cached_property
    def _active(self) -> list[Operation]:
        return sorted((op for op in self.state.operations.values() if op.active), key=lambda op: (op.started, op.id))

    @cached_property
    def assigned(self) -> dict[int, tuple[str, RankSpec]]:
        """rank -> (node, spec), from the assignments that are for their node's present agent."""
        return {
            spec.rank: (node, spec)
            for node, assignment in sorted(self.state.assignments.items())
            if self.addressed(assignment)
            for spec in assignment.ranks
        }

    def addressed(self, assignment: Assignment) -> bool:
        """Whether the assignment is for the agent that the node has now (or had last)."""
        agent = self.state.agents.get(assignment.node)
        return agent is None or agent.started == assignment.agent_started

    @cached_property
    def leaving(self) -> frozenset[str]:
        """Nodes that are to be relieved of their ranks: their agents ask for it, and somebody lives elsewhere."""
        asking = {node for node, agent in self.state.agents.items() if agent.leaving}
        return frozenset(asking) if any(m.node not in asking for m in self.alive) else frozenset()

    def record(self, member: Member) -> RankRecord | None:
        """What the member's agent says of it."""
        return self.state.ranks.get((member.rank, member.incarnation))

    @cached_property
    def masked(self) -> frozenset[int]:
        """Ranks of the view that the present engine has taken out of use."""
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
        """Whether it certainly does not run, or must not: its exit is known, or nobody is to run it any more."""
        node, spec = self.assigned.get(member.rank, ("", None))
        if spec is None or (node, spec.incarnation) != (member.node, member.incarnation):
            return True
        return self.exited(member)

    def exited(self, member: Member) -> bool:
        """Whether its agent saw it die."""
        last = self.state.exits.get(member.rank)
        return last is not None and last.incarnation == member.incarnation

    @cached_property
    def newcomers(self) -> dict[int, Newcomer]:
        """Assigned ranks that are not members."""
        known = {(m.rank, m.incarnation) for m in self.members}
        return {
            rank: self._newcomer(node, spec)
            for rank, (node, spec) in self.assigned.items()
            if (rank, spec.incarnation) not in known
        }

    def _newcomer(self, node: str, spec: RankSpec) -> Newcomer:
        member = Member(rank=spec.rank, node=node, incarnation=spec.incarnation)
        record = self.record(member)
        registered = record is not None and record.state is not RankState.LAUNCHING
        limit = self.config.launch_deadline_s
        trouble = ""
        if self.exited(member):
            trouble = f"rank {member.rank} died: {self.state.exits[member.rank].reason}"
        elif record is None and node not in self.state.agents:
            trouble = f"rank {member.rank} is lost with the agent of node {node}"
        elif not registered and self.now >= spec.launched + limit:
            trouble = f"rank {member.rank} did not register within {limit:g} s of its launch"
        elif record is not None and self._differs(record):
            trouble = f"rank {member.rank} computes with another kernel than the others ({record.fingerprint})"
        return Newcomer(member, registered, trouble)

    def _differs(self, record: RankRecord) -> bool:
        """Whether its kernel fingerprint would let outputs differ from what the serving ranks compute."""
        if self.config.exactness != "invariant" or not record.fingerprint:
            return False
        others = (self.record(m) for m in self.alive)
        return any(other is not None and other.fingerprint not in ("", record.fingerprint) for other in others)

    @cached_property
    def target(self) -> int:
        """How many ranks to aim at: what is desired, as far as it can be."""
        config = self.config
        return max(1, min(self.desired.ranks, config.max_ranks, max_ranks_allowed(config.experts, config.redundancy)))

    @cached_property
    def keep(self) -> tuple[Member, ...]:
        """Live members that shall stay: the lowest ranks, if there are too many."""
        staying = tuple(m for m in self.alive if m.node not in self.leaving)
        if self._settled:
            return tuple(m for m in staying if m.rank in self.desired.slots)
        return tuple(m for m in staying if m.rank not in self.desired.cordoned)[: self.target]

    @cached_property
    def relieved(self) -> tuple[Member, ...]:
        """Live members whom their node is to be relieved of."""
        return tuple(m for m in self.alive if m.node in self.leaving)

    @cached_property
    def fill(self) -> tuple[int, ...]:
        """Slots that shall get a new rank, never drained ones: those named, then those there were, then the lowest.

        An operation steers clear of quarantined slots; a repair never does.
        """
        kept = {m.rank for m in self.keep}
        if self._settled:
            return tuple(slot for slot in self.desired.slots if slot not in kept)
        barred, named = set(self.desired.cordoned), self.operation.ranks if self.operation is not None else ()
        if self.operation is not None:
            barred |= {rank for rank, last in self.state.exits.items() if last.quarantined}
        order = dict.fromkeys(chain(named, self.desired.slots, range(self.target + len(kept) + len(barred))))
        free = (slot for slot in order if slot not in kept | barred)
        return tuple(sorted(islice(free, self.target - len(kept))))

    @cached_property
    def _settled(self) -> bool:
        """Whether the slots were chosen already (and no operation is choosing others)."""
        return self.operation is None and len(self.desired.slots) == self.target

    @cached_property
    def ready(self) -> tuple[Member, ...]:
        """Wanted newcomers that have registered and may be staged."""
        return tuple(n.member for n in self.coming.values() if n.registered and not n.trouble)

    @cached_property
    def coming(self) -> dict[int, Newcomer]:
        """Newcomers that are wanted where they are."""
        found = {slot: self.newcomers[slot] for slot in self.fill if slot in self.newcomers}
        return {slot: n for slot, n in found.items() if n.member.node not in self.leaving}

    @cached_property
    def flipped(self) -> bool:
        """Whether no engine uses an older view any more."""
        status = self.state.engine_status
        if self.state.engine is None:
            return True
        return status is not None and status.token == self.state.engine_token and status.epoch >= self.view.epoch

    @cached_property
    def surplus(self) -> tuple[Member, ...]:
        """Assigned ranks that nobody wants any more."""
        return tuple(n.member for rank, n in sorted(self.newcomers.items()) if rank not in self.coming)

    @cached_property
    def lingering(self) -> tuple[tuple[int, int], ...]:
        """Ranks that have left the view and the assignments, and have not ended yet."""
        known = {(m.rank, m.incarnation) for m in self.members}
        known |= {(spec.rank, spec.incarnation) for _, spec in self.assigned.values()}
        return tuple(sorted(key for key in self.state.ranks if key not in known))

    @cached_property
    def unprepared(self) -> tuple[Member, ...]:
        """Members of the staged view that have not prepared it."""
        staged = self.state.next.members if self.state.next else ()
        revision = self.state.next_revision
        return tuple(m for m in staged if (r := self.record(m)) is None or r.prepared_revision != revision)

    @cached_property
    def vacated_by(self) -> float:
        """When requests that the engine still moves off ranks that the staged view leaves out hold it up no longer.

        In the past if there are none. A repair waits for nobody, and no operation is held up past its deadline.
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
        """Members of the staged view that could not prepare it, and why."""
        records = {m: self.record(m) for m in self.unprepared}
        revision = self.state.next_revision
        return {m: r.prepare_error for m, r in records.items() if r is not None and r.failed_revision == revision}


def scale_refusal(config: ClusterConfig, ranks: int) -> str:
    """Return why the cluster cannot have this many ranks, or "" if it can."""
    if ranks > config.max_ranks:
        return f"{ranks} ranks are more than the {config.max_ranks} that the cluster was started for (--max-ranks)"
    return refusal(config.experts, config.redundancy, ranks)
