"""What the controller should do next: `reconcile(state, now) -> effects`. Pure.

The controller has no memory: everything it needs is in the store, so any controller can continue from any point. An
effect is one transaction. Rules run in priority order (`RULES`, at the end); the first one that returns an effect wins,
and the next call, on the changed state, finds the rest.

A change of members goes through a *staged* view (`next`). Its members prepare it while the committed view serves. Once
the last of them has reported that it is prepared, the staged view is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from msgspec.structs import replace

from membership.base.enums import OperationKind
from membership.base.timing import FAILED_REST_S, PREPARE_RETRY_MAX_S, PREPARE_RETRY_S, RECORD_MISSING_S
from membership.placement.plan import moves
from membership.planning.autosize import desired_by_agents
from membership.planning.cluster_facts import ClusterFacts, scale_refusal
from membership.planning.identity import learned
from membership.planning.next_view import covers, next_view
from membership.planning.node_selection import choose_nodes, room
from membership.planning.rebalance import rebalance
from membership.store.phases import ORDER, advance
from membership.store.records import (
    Assignment,
    Checkpoint,
    ClusterState,
    Desired,
    Member,
    Operation,
    Phase,
    RankSpec,
    View,
)

EVICT_ATTEMPT = 3  # a member that failed this often to prepare what others could is replaced


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """One atomic change of the store. A field at its default changes nothing."""

    reason: str
    commit: View | None = None
    checkpoint: Checkpoint | None = None
    stage: View | None = None
    unstage: bool = False
    assignments: tuple[Assignment, ...] = ()
    incarnation: int | None = None
    desired: Desired | None = None
    operation: Operation | None = None


def reconcile(state: ClusterState, now: float) -> list[Effect]:
    """Return what to do now; empty if the cluster is as desired, or another process has to act first."""
    if state.config is None or state.desired is None:
        return []
    facts = ClusterFacts(state, now)
    for rule in RULES:
        effect = rule(facts)
        if effect is not None:
            return [effect]
    return []


def due(state: ClusterState, now: float) -> float | None:
    """Return when `reconcile` may next give another answer although nothing changed in the store; None: never."""
    if state.config is None:
        return None
    limit = state.config.launch_deadline_s
    times = [op.deadline for op in state.operations.values() if op.active]
    times += [last.not_before for last in state.exits.values()]
    times += [spec.launched + limit for a in state.assignments.values() for spec in a.ranks]
    times += [since + RECORD_MISSING_S for since in state.missing.values()]
    if state.next is not None:
        facts = ClusterFacts(state, now)
        times += [state.next.staged + limit, state.next.staged + _pause(state.next.attempt), facts.vacated_by]
        times += [state.next.staged + FAILED_REST_S] if _same_members(facts) else []
    elif state.desired is not None and quiet(facts := ClusterFacts(state, now)):
        better = rebalance(facts)
        pause = [state.pause.until] if state.pause is not None else []
        times += pause if state.config.follow_agents else []
        times += [max([better.at, *pause])] if better is not None else []
    return min((at for at in times if at > now), default=None)


def _commit(facts: ClusterFacts) -> Effect | None:
    """Commit the staged view once all its members have prepared it."""
    staged, operation = facts.state.next, facts.operation
    if staged is None or facts.unprepared or facts.now < facts.vacated_by or not sound(facts):
        return None
    if operation is not None and operation.cancelled:
        return None
    if operation is not None and len(staged.members) == operation.target:
        operation = _until(operation, Phase.READY, facts.now)
        operation = advance(operation, Phase.COMMITTED, now=facts.now, epoch=staged.epoch)
    else:
        operation = None
    return Effect(
        reason=f"all {len(staged.members)} members are ready for epoch {staged.epoch}",
        commit=staged,
        checkpoint=learned(facts.state),
        operation=operation,
        desired=_with_slots(facts, staged),
    )


def _with_slots(facts: ClusterFacts, view: View) -> Desired | None:
    """Return the desired state that fixes this view's slots, if the view is complete and its slots are new."""
    complete = len(view.members) == facts.target and view.ranks != facts.desired.slots
    return replace(facts.desired, slots=view.ranks) if complete else None


def _abort(facts: ClusterFacts) -> Effect | None:
    """Roll back an operation that cannot succeed. The serving ranks are not affected."""
    operation = facts.operation
    reason = _obstacle(facts, operation) if operation is not None else ""
    if operation is None or not reason:
        return None
    state = facts.state
    aborted = advance(operation, Phase.ABORTED, now=facts.now, error=reason)
    desired = desired_without(operation, facts.desired, len(facts.members))
    rolled_back = replace(state, desired=desired, operations={**state.operations, operation.id: aborted})
    wanted = ClusterFacts(rolled_back, facts.now).fill
    needless = {n.member for rank, n in facts.newcomers.items() if rank not in wanted}
    return Effect(
        reason=f"operation {operation.id} aborted: {reason}",
        operation=aborted,
        desired=desired,
        unstage=_stages(facts, operation),
        assignments=_without(facts, needless),
    )


def desired_without(operation: Operation, present: Desired, members: int) -> Desired:
    """Return the desired state after the operation is rolled back."""
    cordoned = set(present.cordoned)
    if operation.kind is OperationKind.DRAIN:
        cordoned -= set(operation.ranks)
    elif operation.kind is OperationKind.UNDRAIN:
        cordoned |= set(operation.ranks)
    ranks = operation.previous or members or 1
    return replace(present, ranks=ranks, operation="", cordoned=tuple(sorted(cordoned)))


def _obstacle(facts: ClusterFacts, operation: Operation) -> str:
    """Return why the operation can no longer succeed, or "" if it still can."""
    if operation.cancelled:
        return f"cancelled by {operation.cancelled}"
    refused = scale_refusal(facts.config, operation.target)
    if refused:
        return refused
    if operation.phase is not Phase.PROPOSED:
        for slot, newcomer in sorted(facts.newcomers.items()):
            if newcomer.trouble and (slot in facts.fill or facts.refused(newcomer.member)):
                return newcomer.trouble
        for assignment in facts.state.assignments.values():
            known = {m.id for m in facts.members}
            if not facts.addressed(assignment) and {s.id for s in assignment.ranks} - known:
                return f"the agent of node {assignment.node} was replaced"
    if _stages(facts, operation) and facts.failed:
        return "; ".join(f"rank {m.rank} could not prepare: {why}" for m, why in facts.failed.items())
    if _late(facts, operation):
        return f"not done by its deadline; waited for {awaited(facts)}"
    return ""


def _late(facts: ClusterFacts, operation: Operation) -> bool:
    return bool(operation.deadline) and facts.now >= operation.deadline


def awaited(facts: ClusterFacts) -> str:
    """Return what an operation waits for."""
    ready = {m.rank for m in facts.ready}
    absent = [slot for slot in facts.fill if slot not in ready]
    if absent:
        return f"ranks {absent} to register"
    if facts.now < facts.vacated_by and not facts.unprepared:
        return "requests to migrate off the departing ranks"
    return f"ranks {[m.rank for m in facts.unprepared]} to prepare"


def _stages(facts: ClusterFacts, operation: Operation) -> bool:
    """Whether the staged view completes the operation (rather than repairs a loss that happened meanwhile)."""
    staged = facts.state.next
    return staged is not None and len(staged.members) == operation.target


def _unassign(facts: ClusterFacts) -> Effect | None:
    """Unassign ranks that are dead, failed or no longer wanted. Their agents end what still runs."""
    gone = set(facts.members) - set(facts.alive)
    gone |= {n.member for n in facts.newcomers.values() if n.trouble}
    if facts.flipped or (facts.finishing is not None and _late(facts, facts.finishing)):
        gone |= set(facts.surplus)
    assignments = _without(facts, gone)
    if not assignments:
        return None
    ranks = sorted(m.rank for m in gone if m.rank in facts.assigned)
    others = f"nodes {', '.join(a.node for a in assignments)} have another agent"
    return Effect(reason=f"ranks {ranks} are dead or not wanted" if ranks else others, assignments=assignments)


def _without(facts: ClusterFacts, gone: Iterable[Member]) -> tuple[Assignment, ...]:
    """Return the assignments that change when `gone` are removed, and those addressed to a replaced agent."""
    names = {(m.node, m.id) for m in gone}
    changed: list[Assignment] = []
    for node, assignment in sorted(facts.state.assignments.items()):
        if not facts.addressed(assignment):
            changed.append(Assignment(node=node, agent_started=facts.state.agents[node].started))
            continue
        left = tuple(s for s in assignment.ranks if (node, s.id) not in names)
        if left != assignment.ranks:
            changed.append(replace(assignment, ranks=left))
    return tuple(changed)


def sound(facts: ClusterFacts) -> bool:
    """Whether the staged view may be committed once prepared: right epoch, live and wanted members, full coverage.

    A staged rebalance (same members) yields to any other change.
    """
    staged, keep = facts.state.next, set(facts.keep)
    if staged is None or staged.epoch != facts.view.epoch + 1:
        return False
    if _same_members(facts) and (staged.placement == facts.view.placement or not quiet(facts)):
        return False
    if not staged.members or not keep <= set(staged.members) <= keep | set(facts.ready):
        return False
    return set(staged.placement) == set(staged.ranks) and covers(facts, staged.placement)


def _same_members(facts: ClusterFacts) -> bool:
    return facts.state.next is not None and set(facts.state.next.members) == set(facts.members)


def quiet(facts: ClusterFacts) -> bool:
    """Whether the cluster is quiet: no operation, all members alive and wanted, no rank starting or about to."""
    if facts.operation or facts.finishing or facts.newcomers:
        return False
    if not facts.members or not facts.members == facts.alive == facts.keep:
        return False
    return all(_quarantined(facts, slot) or not room(facts) for slot in facts.fill)


def _goal(facts: ClusterFacts) -> tuple[Member, ...]:
    """Return the members that the next view should have; empty if no view should be staged now."""
    keep, ready, fill = facts.keep, facts.ready, facts.fill
    gone = (set(facts.members) - set(facts.alive)) | set(facts.relieved)
    if gone and keep and not (_stuck(facts) and ready):
        return keep  # first commit the loss with the survivors: that depends on no new rank
    if fill:
        missing = [slot for slot in fill if slot not in {m.rank for m in ready}]
        if facts.operation is not None or facts.state.view is None:
            complete = all(_quarantined(facts, slot) for slot in missing) and not (facts.operation and missing)
        else:
            complete = not any(_coming(facts, slot) for slot in missing)
        return keep + ready if ready and complete else ()
    return keep if set(keep) != set(facts.members) else ()


def _quarantined(facts: ClusterFacts, slot: int) -> bool:
    last = facts.state.exits.get(slot)
    return last is not None and last.quarantined


def _coming(facts: ClusterFacts, slot: int) -> bool:
    """Whether a rank is starting in the slot, or could be started now."""
    return slot in facts.coming or (_may_start(facts, slot) and bool(room(facts)))


def _stuck(facts: ClusterFacts) -> bool:
    """Whether the staged view failed before. Then any rank that is ready may join it."""
    return facts.state.next is not None and facts.state.next.attempt > 0


def _stage(facts: ClusterFacts) -> Effect | None:
    """Stage the view that the cluster should have next, or unstage one that is out of date."""
    staged, goal = facts.state.next, _goal(facts)
    if staged is not None and sound(facts) and not (_stuck(facts) and goal and set(goal) != set(staged.members)):
        return _retry(facts, staged)
    if goal:
        return _staging(facts, goal, attempt=0)
    if staged is not None:
        return Effect(reason=f"staged epoch {staged.epoch} is out of date", unstage=True)
    return None


def _retry(facts: ClusterFacts, staged: View) -> Effect | None:
    """Stage a view again if members failed to prepare it or have no record; at the third failure, replace them.

    A member with a record may load for as long as its agent sees it advance: no time is too long for that.
    """
    overdue = facts.now >= staged.staged + facts.config.launch_deadline_s
    blamed = set(facts.failed) | ({m for m in facts.unprepared if facts.record(m) is None} if overdue else set())
    if _same_members(facts):  # a failed rebalance evicts no rank: all serve as they are
        late = facts.now >= staged.staged + FAILED_REST_S and blamed
        return Effect(reason=f"rebalance to epoch {staged.epoch} failed", unstage=True) if late else None
    if not blamed or facts.now < staged.staged + _pause(staged.attempt):
        return None
    if blamed and staged.attempt + 1 >= EVICT_ATTEMPT and blamed != set(staged.members):
        ranks = sorted(m.rank for m in blamed)
        return Effect(
            reason=f"ranks {ranks} cannot prepare epoch {staged.epoch}: {'; '.join(facts.failed.values())}",
            unstage=True,
            assignments=_without(facts, blamed),
        )
    return _staging(facts, staged.members, attempt=staged.attempt + 1)


def _pause(attempt: int) -> float:
    return min(PREPARE_RETRY_MAX_S, PREPARE_RETRY_S * 2.0 ** min(attempt, 10))


def _staging(facts: ClusterFacts, members: tuple[Member, ...], attempt: int) -> Effect:
    view = next_view(facts, members, bare=attempt > 0)
    operation = facts.operation
    if operation is not None and len(members) == operation.target:
        moved = len(moves(facts.view.placement, view.placement)) * facts.config.expert_bytes
        operation = replace(_until(operation, Phase.LOADING, facts.now), bytes_moved=moved)
    else:
        operation = None
    again = f", attempt {attempt + 1}" if attempt else ""
    return Effect(
        reason=f"epoch {view.epoch} with ranks {list(view.ranks)}{again}",
        stage=replace(view, staged=facts.now, attempt=attempt),
        operation=operation if operation != facts.operation else None,
    )


def _until(operation: Operation, phase: Phase, now: float) -> Operation:
    """Advance an operation to `phase` through the phases between; unchanged if it is there or further."""
    start, end = ORDER.index(operation.phase), ORDER.index(phase)
    skipped = {Phase.SPAWNING, Phase.HANDSHAKING} if operation.phase is Phase.PROPOSED else set()  # it starts no rank
    return advance(operation, *(p for p in ORDER[start + 1 : end + 1] if p not in skipped), now=now)


def _may_start(facts: ClusterFacts, slot: int) -> bool:
    """Whether a new rank may be started in the slot now."""
    last = facts.state.exits.get(slot)
    if slot in facts.assigned or (last is not None and (last.quarantined or last.held_back_s(facts.now))):
        return False
    lost = facts.view.member(slot) is not None  # not before the loss is committed, unless that needs the new rank
    return not lost or not facts.keep or _stuck(facts)


def _assign(facts: ClusterFacts) -> Effect | None:
    """Start new incarnations in the slots to fill, each on the live agent with the fewest ranks."""
    state = facts.state
    if not facts.view.epoch and len(state.agents) < facts.config.min_agents:
        return None  # else all ranks would be on the first ones to come
    known = [*(m.id for m in facts.members), *state.ranks]
    incarnation = max([state.incarnation, *(m.incarnation for m in known)])
    sent: dict[str, list[RankSpec]] = {}
    for slot, node in choose_nodes(facts, (slot for slot in facts.fill if _may_start(facts, slot))).items():
        incarnation += 1
        sent.setdefault(node, []).append(RankSpec(rank=slot, incarnation=incarnation, launched=facts.now))
    if not sent:
        return None
    operation = facts.operation
    if operation is not None:
        proposed = operation.phase is Phase.PROPOSED
        operation = advance(operation, Phase.SPAWNING, now=facts.now) if proposed else None
    return Effect(
        reason=f"start ranks {sorted(spec.rank for specs in sent.values() for spec in specs)}",
        assignments=tuple(_extended(state, node, specs) for node, specs in sorted(sent.items())),
        incarnation=incarnation,
        operation=operation,
    )


def _extended(state: ClusterState, node: str, specs: list[RankSpec]) -> Assignment:
    before = state.assignments.get(node, Assignment(node=node))
    return replace(before, ranks=(*before.ranks, *specs), agent_started=state.agents[node].started)


def _advance_operation(facts: ClusterFacts) -> Effect | None:
    """Advance an operation to its next phase once that phase is reached."""
    operation = facts.operation or facts.finishing
    moved = _moved(facts, operation) if operation is not None else None
    if moved is None:
        return None
    desired = _with_slots(facts, facts.view) if moved.phase is Phase.COMMITTED else None
    return Effect(reason=f"operation {moved.id} is {moved.phase}", operation=moved, desired=desired)


def _moved(facts: ClusterFacts, operation: Operation) -> Operation | None:
    now = facts.now
    late = _late(facts, operation)
    if operation.phase is Phase.COMMITTED:
        staged_one = Phase.READY.value in operation.phase_times  # else the engine's pause is an earlier operation's
        if staged_one and facts.flipped and facts.state.engine_status is not None:
            operation = replace(operation, pause_ms=facts.state.engine_status.pause_ms)
        return advance(operation, Phase.RETIRING, now=now) if facts.flipped or late else None
    if operation.phase is Phase.RETIRING:
        retired = not facts.surplus and not facts.lingering
        return advance(operation, Phase.DONE, now=now) if retired or late else None
    if not facts.fill and len(facts.keep) == len(facts.members) == operation.target:
        return advance(operation, Phase.COMMITTED, now=now, epoch=facts.view.epoch)
    here = all((m := facts.newcomers.get(slot)) and facts.record(m.member) for slot in facts.fill)
    if operation.phase is Phase.SPAWNING and facts.fill and here:
        return advance(operation, Phase.HANDSHAKING, now=now)
    return None


def _follow_agents(facts: ClusterFacts) -> Effect | None:
    """With `--follow-agents`: set the size from the number of agents."""
    desired = desired_by_agents(facts)
    if desired is None:
        return None
    return Effect(reason=f"{len(desired.nodes)} agents, so {desired.ranks} ranks", desired=desired)


def _rebalance(facts: ClusterFacts) -> Effect | None:
    """In a quiet cluster: stage a better placement of the same members, one byte budget at a time."""
    if facts.state.next is not None or facts.state.paused(facts.now) or not quiet(facts):
        return None
    if any(member.node not in facts.state.agents for member in facts.members):
        return None  # what it ends with is in its agent's record, which will be written again
    better = rebalance(facts)
    if better is None or facts.now < better.at:
        return None
    view = replace(
        facts.view, epoch=facts.view.epoch + 1, placement=better.placement, staged=facts.now, attempt=0,
        unfinished=better.unfinished, urgent=False,
    )  # fmt: skip
    return Effect(reason=f"epoch {view.epoch}: {better.reason}", stage=view)


RULES: tuple[Callable[[ClusterFacts], Effect | None], ...] = (
    _commit,
    _abort,
    _follow_agents,
    _unassign,
    _stage,
    _assign,
    _advance_operation,
    _rebalance,
)
