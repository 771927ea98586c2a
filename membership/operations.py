"""Operations as those who ask for them see them: propose one, or plan without doing it.

An operation and the wish it carries (`desired`) are written in one transaction that compares `desired`: of two that
are proposed at once, one wins and the other finds it. The controller does the rest.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from membership.census import Census, scale_refusal
from membership.codec import decode, encode
from membership.errors import (
    ConfigError,
    Fenced,
    OperationConflict,
    PlanRefused,
    StoreUnavailable,
    WaitTimeout,
)
from membership.keys import Keys, state_from
from membership.placement import coverage, moves
from membership.resilience import Resilience, needed_slots, resilience
from membership.seating import seats
from membership.store import Compare, Delete, Op, Put, Store
from membership.succession import next_view
from membership.types import ClusterState, Desired, Member, Operation, Phase

KEPT = 32  # finished operations that stay readable


class ScalePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a scale to `target` would do. `refused` says why it would be refused; "" if it would not."""

    target: int
    epoch: int  # the present one
    ranks: tuple[int, ...] = ()  # serving now
    add: tuple[int, ...] = ()
    remove: tuple[int, ...] = ()
    loads: dict[int, int] = {}  # rank -> experts (over all layers) that it would load
    bytes_moved: int = 0
    replicas_before: int = 0  # the fewest of any expert
    replicas_after: int = 0
    slots_before: int = 0  # the most that any rank holds
    slots_after: int = 0
    survives: Resilience | None = None  # what may die once it is done
    slots_for_rank_loss: int | None = None  # slots in all with which any one rank may die; None: no number suffices
    slots_for_host_loss: int | None = None  # and any one host
    estimated_s: float | None = None  # as long as the last such operation took per byte; None: nothing to go by yet
    refused: str = ""

    @property
    def changes(self) -> bool:
        """Whether it would change anything."""
        return not self.refused and bool(self.add or self.remove or self.loads)


def plan_scale(state: ClusterState, target: int) -> ScalePlan:
    """Return what a scale to `target` would do, from this state on, if nothing fails. Pure; changes nothing."""
    if state.config is None or state.view is None:
        return ScalePlan(target=target, epoch=0, refused="the cluster is still starting: it has no view yet")
    view, config = state.view, state.config
    refused = scale_refusal(config, target)
    before = coverage(view.placement, view.ranks, config.experts)
    plan = ScalePlan(
        target=target,
        epoch=view.epoch,
        ranks=view.ranks,
        replicas_before=before.min_live_replicas,
        slots_before=max((sum(map(len, held)) for held in view.placement.values()), default=0),
        refused=refused,
    )
    return plan if refused else _with_changes(plan, state)


def _with_changes(plan: ScalePlan, state: ClusterState) -> ScalePlan:
    wish = Operation(id="plan", kind="scale", target=plan.target)
    slots = state.desired.slots if state.desired else ()
    wished = replace(state, desired=Desired(ranks=plan.target, slots=slots), operations={wish.id: wish})
    census = Census(wished, 0.0)
    seated = {slot: newcomer.member.node for slot, newcomer in census.newcomers.items()}
    seated |= seats(census, (slot for slot in census.fill if slot not in seated))
    members = census.keep + tuple(Member(rank=slot, node=seated.get(slot, ""), incarnation=0) for slot in census.fill)
    after = next_view(census, members)
    needed = moves(census.view.placement, after.placement)
    fresh = {m.rank for m in members if m not in census.members}
    loads = {rank: sum(move.rank == rank for move in needed) for rank in after.ranks if rank not in fresh}
    loads |= {rank: sum(map(len, after.placement[rank])) for rank in fresh}
    config, nodes = census.config, {m.rank: m.node for m in members}
    bytes_moved = sum(loads.values()) * config.expert_bytes
    return replace(
        plan,
        add=tuple(sorted(fresh)),
        remove=tuple(rank for rank in plan.ranks if rank not in after.ranks),
        loads={rank: number for rank, number in sorted(loads.items()) if number},
        bytes_moved=bytes_moved,
        replicas_after=coverage(after.placement, after.ranks, config.experts).min_live_replicas,
        slots_after=max(sum(map(len, held)) for held in after.placement.values()),
        survives=resilience(after.placement, nodes, config.moe_layers, config.experts),
        slots_for_rank_loss=needed_slots(nodes, config.moe_layers, config.experts),
        slots_for_host_loss=needed_slots(nodes, config.moe_layers, config.experts, hosts=True),
        estimated_s=_estimated_s(state, bytes_moved, launches=bool(fresh)),
    )


def _estimated_s(state: ClusterState, bytes_moved: int, *, launches: bool) -> float | None:
    """How long it takes, from the last operations that are done: one that launched ranks too, and one that loaded."""
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


def _between(operation: Operation, first: Phase, last: Phase) -> float:
    times = operation.phase_times
    return max(0.0, times.get(last, 0.0) - times.get(first, 0.0)) if last in times else 0.0


def propose_scale(
    store: Store,
    cluster: str,
    target: int,
    *,
    op_id: str | None = None,
    if_epoch: int | None = None,
    timeout_s: float = 300.0,
    clock: Callable[[], float] = time.time,
) -> Operation:
    """Ask for `target` ranks; return the operation, which ends within `timeout_s`. The same id returns the same one.

    OperationConflict names the operation that is in the way; Fenced: the epoch is not `if_epoch`; PlanRefused says why.
    """
    keys, name = Keys(cluster), op_id or uuid.uuid4().hex[:12]
    deadline = clock() + timeout_s
    while True:
        revision, items = store.range(keys.prefix)
        state = state_from(items, revision)
        known = state.operations.get(name)
        if known is not None:
            return _same(known, target)
        _admit(state, cluster, target, if_epoch)
        now = clock()
        if now >= deadline:
            raise WaitTimeout(f"operation {name} could not be proposed within {timeout_s:g} s: others kept changing")
        operation, desired = _wish(state, name, target, if_epoch or 0, now, deadline)
        unchanged = [Compare(key, "mod", "<", revision + 1) for key in (keys.desired, keys.op(name), keys.view)]
        ops: list[Op] = [Put(keys.op(name), encode(operation)), Put(keys.desired, encode(desired))]
        ops += _forgotten(state, keys)
        try:
            if store.txn(unchanged, ops).succeeded:
                return operation
        except StoreUnavailable:  # unknown whether it took effect: read back
            found = store.get(keys.op(name))
            if found is None:
                raise
            return decode(found.value, Operation)


def _wish(
    state: ClusterState, name: str, target: int, if_epoch: int, now: float, deadline: float
) -> tuple[Operation, Desired]:
    before = state.desired or Desired(ranks=target)
    operation = Operation(
        id=name,
        kind="scale",
        target=target,
        previous=before.ranks,
        started=now,
        deadline=deadline,
        if_epoch=if_epoch,
        phase_times={Phase.PROPOSED.value: now},
    )
    return operation, Desired(ranks=target, operation=name, slots=before.slots)


def _same(known: Operation, target: int) -> Operation:
    if known.target != target:
        raise OperationConflict(f"operation {known.id} exists already, with target {known.target}, not {target}")
    return known


def _admit(state: ClusterState, cluster: str, target: int, if_epoch: int | None) -> None:
    """Raise if the operation must not be proposed now."""
    if state.config is None:
        raise ConfigError(f"there is no cluster {cluster!r} in this store", hint="check --cluster and --etcd")
    epoch = state.view.epoch if state.view else 0
    if if_epoch is not None and if_epoch != epoch:
        raise Fenced(f"the epoch is {epoch}, not {if_epoch}", hint="look at the new state, then decide again")
    active = next((op for op in state.operations.values() if op.active), None)
    if active is not None:
        raise OperationConflict(
            f"operation {active.id} ({active.kind} to {active.target}, {active.phase}) is active",
            hint=f"wait for it: elastic scale {active.target} --op-id {active.id}",
        )
    refused = plan_scale(state, target).refused
    if refused:
        raise PlanRefused(refused)


def _forgotten(state: ClusterState, keys: Keys) -> list[Delete]:
    """The oldest finished operations, as far as they are too many."""
    finished = sorted((op for op in state.operations.values() if not op.active), key=lambda op: op.started)
    return [Delete(keys.op(op.id)) for op in finished[:-KEPT]]
