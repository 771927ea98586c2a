"""Dry run of a change request: ranks added and removed, experts loaded, and what the result survives. Pure."""

from __future__ import annotations

from statistics import median

import msgspec
from msgspec.structs import replace

from membership.base.enums import OperationKind
from membership.operations.change import Change, desired_by, refusal
from membership.placement.plan import coverage, moves
from membership.placement.survivability import Survivability, needed_slots, survivability
from membership.planning.cluster_facts import ClusterFacts
from membership.planning.next_view import next_view
from membership.planning.node_selection import choose_nodes
from membership.store.records import ClusterState, Desired, Member, Operation, Phase


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a change would do. `refused`: why it would be refused; "" if it would not."""

    kind: OperationKind = OperationKind.SCALE
    target: int  # desired ranks afterwards
    epoch: int  # the current one
    ranks: tuple[int, ...] = ()  # members now
    add: tuple[int, ...] = ()
    remove: tuple[int, ...] = ()
    loads: dict[int, int] = {}  # rank -> number of experts (over all layers) that it would load
    bytes_moved: int = 0
    replicas_before: int = 0  # the fewest of any expert
    replicas_after: int = 0
    slots_before: int = 0  # the most that any rank holds
    slots_after: int = 0
    survives: Survivability | None = None  # afterwards
    slots_for_rank_loss: int | None = None  # total slots to survive the death of any one rank; None: none suffice
    slots_for_host_loss: int | None = None  # the same for any one host
    estimated_s: float | None = None  # from the last such operation, per byte; None: there was none
    expected_pause_ms: float | None = None  # of tokens at the commit: median of past operations
    refused: str = ""

    @property
    def changes(self) -> bool:
        """Whether it would change anything."""
        return not self.refused and bool(self.add or self.remove or self.loads)


def plan_change(change: Change, state: ClusterState) -> Plan:
    """Return what the change would do from this state, if nothing fails. Changes nothing."""
    if state.config is None or state.view is None or state.desired is None:
        return Plan(target=change.target, epoch=0, refused="the cluster is still starting: it has no view yet")
    view, config = state.view, state.config
    before = coverage(view.placement, view.ranks, config.experts)
    plan = Plan(
        kind=change.kind,
        target=desired_by(change, state.desired).ranks,
        epoch=view.epoch,
        ranks=view.ranks,
        replicas_before=before.min_live_replicas,
        slots_before=max((sum(map(len, held)) for held in view.placement.values()), default=0),
        refused=refusal(change, state, config),
    )
    return plan if plan.refused else _with_changes(plan, change, state, desired_by(change, state.desired))


def _with_changes(plan: Plan, change: Change, state: ClusterState, desired: Desired) -> Plan:
    operation = Operation(id="plan", kind=change.kind, target=plan.target, ranks=change.ranks)
    facts = ClusterFacts(replace(state, desired=desired, operations={operation.id: operation}), 0.0)
    nodes_of = {slot: newcomer.member.node for slot, newcomer in facts.newcomers.items()}
    nodes_of |= choose_nodes(facts, (slot for slot in facts.fill if slot not in nodes_of))
    members = facts.keep + tuple(Member(rank=slot, node=nodes_of.get(slot, ""), incarnation=0) for slot in facts.fill)
    after = next_view(facts, members)
    needed = moves(facts.view.placement, after.placement)
    fresh = {m.rank for m in members if m not in facts.members}
    loads = {rank: sum(move.rank == rank for move in needed) for rank in after.ranks if rank not in fresh}
    loads |= {rank: sum(map(len, after.placement[rank])) for rank in fresh}
    config, nodes = facts.config, facts.domains(members)
    bytes_moved = sum(loads.values()) * config.expert_bytes
    return replace(
        plan,
        add=tuple(sorted(fresh)),
        remove=tuple(rank for rank in plan.ranks if rank not in after.ranks),
        loads={rank: number for rank, number in sorted(loads.items()) if number},
        bytes_moved=bytes_moved,
        replicas_after=coverage(after.placement, after.ranks, config.experts).min_live_replicas,
        slots_after=max(sum(map(len, held)) for held in after.placement.values()),
        survives=survivability(after.placement, nodes, config.moe_layers, config.experts),
        slots_for_rank_loss=needed_slots(nodes, config.moe_layers, config.experts),
        slots_for_host_loss=needed_slots(nodes, config.moe_layers, config.experts, hosts=True),
        expected_pause_ms=_expected_pause_ms(state),
        estimated_s=_estimated_s(state, bytes_moved, launches=bool(fresh)),
    )


def _estimated_s(state: ClusterState, bytes_moved: int, *, launches: bool) -> float | None:
    """Estimate the duration from the last completed operations that launched ranks and that loaded experts."""
    done = sorted((op for op in state.operations.values() if op.phase is Phase.DONE), key=lambda op: op.finished)
    total_s = 0.0
    if launches:
        took = [_between(op, Phase.PROPOSED, Phase.LOADING) for op in done if Phase.SPAWNING in op.phase_times]
        if not took:
            return None
        total_s += took[-1]
    if bytes_moved:
        paces = [_between(op, Phase.LOADING, Phase.READY) / op.bytes_moved for op in done if op.bytes_moved]
        if not paces:
            return None
        total_s += paces[-1] * bytes_moved
    return total_s


def _expected_pause_ms(state: ClusterState) -> float | None:
    paused = [op.pause_ms for op in state.operations.values() if op.phase is Phase.DONE and op.pause_ms]
    return median(paused) if paused else None


def _between(operation: Operation, first: Phase, last: Phase) -> float:
    times = operation.phase_times
    return max(0.0, times.get(last, 0.0) - times.get(first, 0.0)) if last in times else 0.0
