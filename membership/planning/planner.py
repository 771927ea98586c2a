"""What the controller should do next: `reconcile(state, now) -> effects`, pure, over the whole life of a cluster.

The controller has no memory: everything it needs is in the store, so any controller can go on from any point. Each
effect is one transaction. The rules are asked in order and the first that has something to do is heard; the next look,
at the state with that done, finds the rest. A change of members goes through a *staged* view (`next`): its members
prepare it while the committed one serves, and the last report of readiness commits it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from msgspec.structs import replace

from membership.placement.plan import moves
from membership.planning.autosize import followed
from membership.planning.cluster_facts import Census, scale_refusal
from membership.planning.next_view import covers, next_view
from membership.planning.node_selection import room, seats
from membership.planning.rebalance import FAILED_REST_S, rebalance
from membership.store.phases import ORDER, advance
from membership.store.records import Assignment, ClusterState, Desired, Member, Operation, Phase, RankSpec, View

RETRY_S = 0.5  # before a view that could not be prepared is staged again; doubles with each attempt
RETRY_MAX_S = 10.0
EVICT_ATTEMPT = 3  # a member that failed this often to prepare what others could is replaced


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """One atomic change of the store. Fields left at their default are left alone."""

    reason: str
    commit: View | None = None
    stage: View | None = None
    unstage: bool = False
    assignments: tuple[Assignment, ...] = ()
    incarnation: int | None = None
    desired: Desired | None = None
    operation: Operation | None = None


def reconcile(state: ClusterState, now: float) -> list[Effect]:
    """Return what to do now; nothing if the cluster is as it should be, or somebody else has to move first."""
    if state.config is None or state.desired is None:
        return []
    census = Census(state, now)
    for rule in RULES:
        effect = rule(census)
        if effect is not None:
            return [effect]
    return []


def due(state: ClusterState, now: float) -> float | None:
    """Return the next time at which `reconcile` might answer differently though nothing changed in the store."""
    if state.config is None:
        return None
    limit = state.config.launch_deadline_s
    times = [op.deadline for op in state.operations.values() if op.active]
    times += [last.not_before for last in state.exits.values()]
    times += [spec.launched + limit for a in state.assignments.values() for spec in a.ranks]
    if state.next is not None:
        census = Census(state, now)
        times += [state.next.staged + limit, state.next.staged + _pause(state.next.attempt), census.vacated_by]
        times += [state.next.staged + FAILED_REST_S] if _same_members(census) else []
    elif state.desired is not None and quiet(census := Census(state, now)):
        better = rebalance(census)
        paused_until = state.pause.until if state.pause is not None else 0.0
        times += [paused_until] if state.config.follow_agents else []
        times += [max(better.at, paused_until)] if better is not None else []
    return min((at for at in times if at > now), default=None)


def _commit(census: Census) -> Effect | None:
    """All members have prepared the staged view: it becomes the view."""
    staged, operation = census.state.next, census.operation
    if staged is None or census.unprepared or census.now < census.vacated_by or not sound(census):
        return None
    if operation is not None and operation.cancelled:
        return None
    if operation is not None and len(staged.members) == operation.target:
        operation = _until(operation, Phase.READY, census.now)
        operation = advance(operation, Phase.COMMITTED, now=census.now, epoch=staged.epoch)
    else:
        operation = None
    return Effect(
        reason=f"all {len(staged.members)} members are ready for epoch {staged.epoch}",
        commit=staged,
        operation=operation,
        desired=_chosen(census, staged),
    )


def _chosen(census: Census, view: View) -> Desired | None:
    """The slots that make up the cluster from now on, once a view has all that is asked for."""
    complete = len(view.members) == census.target and view.ranks != census.desired.slots
    return replace(census.desired, slots=view.ranks) if complete else None


def _abort(census: Census) -> Effect | None:
    """An operation that cannot be carried out is rolled back: what serves never noticed it."""
    operation = census.operation
    reason = _obstacle(census, operation) if operation is not None else ""
    if operation is None or not reason:
        return None
    state = census.state
    aborted = advance(operation, Phase.ABORTED, now=census.now, error=reason)
    desired = desired_without(operation, census.desired, len(census.members))
    rolled_back = replace(state, desired=desired, operations={**state.operations, operation.id: aborted})
    wanted = Census(rolled_back, census.now).fill
    needless = {n.member for rank, n in census.newcomers.items() if rank not in wanted}
    return Effect(
        reason=f"operation {operation.id} aborted: {reason}",
        operation=aborted,
        desired=desired,
        unstage=_stages(census, operation),
        assignments=_without(census, needless),
    )


def desired_without(operation: Operation, present: Desired, members: int) -> Desired:
    """What is desired once the operation is rolled back."""
    cordoned = set(present.cordoned)
    if operation.kind == "drain":
        cordoned -= set(operation.ranks)
    elif operation.kind == "undrain":
        cordoned |= set(operation.ranks)
    ranks = operation.previous or members or 1
    return replace(present, ranks=ranks, operation="", cordoned=tuple(sorted(cordoned)))


def _obstacle(census: Census, operation: Operation) -> str:
    """Why the operation cannot succeed any more, or "" if it still may."""
    if operation.cancelled:
        return f"cancelled by {operation.cancelled}"
    refused = scale_refusal(census.config, operation.target)
    if refused:
        return refused
    if operation.phase is not Phase.PROPOSED:
        for slot in census.fill:
            if slot in census.newcomers and census.newcomers[slot].trouble:
                return census.newcomers[slot].trouble
        for assignment in census.state.assignments.values():
            known = {(m.rank, m.incarnation) for m in census.members}
            if not census.addressed(assignment) and {(s.rank, s.incarnation) for s in assignment.ranks} - known:
                return f"the agent of node {assignment.node} was replaced"
    if _stages(census, operation) and census.failed:
        return "; ".join(f"rank {m.rank} could not prepare: {why}" for m, why in census.failed.items())
    if _late(census, operation):
        return f"not done by its deadline; waited for {awaited(census)}"
    return ""


def _late(census: Census, operation: Operation) -> bool:
    return bool(operation.deadline) and census.now >= operation.deadline


def awaited(census: Census) -> str:
    """Whom an operation waits for."""
    ready = {m.rank for m in census.ready}
    absent = [slot for slot in census.fill if slot not in ready]
    if absent:
        return f"ranks {absent} to register"
    if census.now < census.vacated_by and not census.unprepared:
        return "requests to move off the ranks that leave"
    return f"ranks {[m.rank for m in census.unprepared]} to prepare"


def _stages(census: Census, operation: Operation) -> bool:
    """Whether the staged view is the operation's last step (and not the repair of a loss on the way)."""
    staged = census.state.next
    return staged is not None and len(staged.members) == operation.target


def _drop(census: Census) -> Effect | None:
    """Take the dead, the failed and the no longer wanted out of the assignments; their agents end what still runs."""
    gone = set(census.members) - set(census.alive)
    gone |= {n.member for n in census.newcomers.values() if n.trouble}
    if census.flipped or (census.finishing is not None and _late(census, census.finishing)):
        gone |= set(census.surplus)
    assignments = _without(census, gone)
    if not assignments:
        return None
    ranks = sorted(m.rank for m in gone if m.rank in census.assigned)
    others = f"nodes {', '.join(a.node for a in assignments)} have another agent"
    return Effect(reason=f"ranks {ranks} are dead or not wanted" if ranks else others, assignments=assignments)


def _without(census: Census, gone: Iterable[Member]) -> tuple[Assignment, ...]:
    """The assignments that change if `gone` leave them, and all that was meant for an earlier agent of a node."""
    names = {(m.node, m.rank, m.incarnation) for m in gone}
    changed: list[Assignment] = []
    for node, assignment in sorted(census.state.assignments.items()):
        if not census.addressed(assignment):
            changed.append(Assignment(node=node, agent_started=census.state.agents[node].started))
            continue
        left = tuple(s for s in assignment.ranks if (node, s.rank, s.incarnation) not in names)
        if left != assignment.ranks:
            changed.append(replace(assignment, ranks=left))
    return tuple(changed)


def sound(census: Census) -> bool:
    """Whether the staged view may be committed once it is prepared: right epoch, live wanted members, full coverage.

    One with the same members (a rebalance) gives way to everything else.
    """
    staged, keep = census.state.next, set(census.keep)
    if staged is None or staged.epoch != census.view.epoch + 1:
        return False
    if _same_members(census) and (staged.placement == census.view.placement or not quiet(census)):
        return False
    if not staged.members or not keep <= set(staged.members) <= keep | set(census.ready):
        return False
    return set(staged.placement) == set(staged.ranks) and covers(census, staged.placement)


def _same_members(census: Census) -> bool:
    return census.state.next is not None and set(census.state.next.members) == set(census.members)


def quiet(census: Census) -> bool:
    """Whether nothing goes on: no operation, all members alive and wanted, nobody on the way or about to be."""
    if census.operation or census.finishing or census.newcomers:
        return False
    if not census.members or not census.members == census.alive == census.keep:
        return False
    return all(_quarantined(census, slot) or not room(census) for slot in census.fill)


def _goal(census: Census) -> tuple[Member, ...]:
    """The members that the next view should have; empty if none should be staged now."""
    keep, ready, fill = census.keep, census.ready, census.fill
    gone = (set(census.members) - set(census.alive)) | set(census.relieved)
    if gone and keep and not (_stuck(census) and ready):
        return keep  # first make a loss durable with those who are left: that depends on nobody new
    if fill:
        missing = [slot for slot in fill if slot not in {m.rank for m in ready}]
        if census.operation is not None or census.state.view is None:
            complete = all(_quarantined(census, slot) for slot in missing) and not (census.operation and missing)
        else:
            complete = not any(_coming(census, slot) for slot in missing)
        return keep + ready if ready and complete else ()
    return keep if set(keep) != set(census.members) else ()


def _quarantined(census: Census, slot: int) -> bool:
    last = census.state.exits.get(slot)
    return last is not None and last.quarantined


def _coming(census: Census, slot: int) -> bool:
    """Whether a rank is on its way into the slot, or could be sent at once."""
    return slot in census.coming or (_may_start(census, slot) and bool(room(census)))


def _stuck(census: Census) -> bool:
    """Whether the staged view failed before: then whoever can help may join it."""
    return census.state.next is not None and census.state.next.attempt > 0


def _stage(census: Census) -> Effect | None:
    """Stage the view that the cluster should have next, or take back one that makes no sense any more."""
    staged, goal = census.state.next, _goal(census)
    if staged is not None and sound(census) and not (_stuck(census) and goal and set(goal) != set(staged.members)):
        return _retry(census, staged)
    if goal:
        return _staging(census, goal, attempt=0)
    if staged is not None:
        return Effect(reason=f"staged epoch {staged.epoch} is out of date", unstage=True)
    return None


def _retry(census: Census, staged: View) -> Effect | None:
    """Stage a view again whose members failed to prepare it or took too long; in the end replace who alone fails."""
    overdue = census.now >= staged.staged + census.config.launch_deadline_s
    if _same_members(census):  # nobody is blamed for a rebalance: all serve as they are
        late = census.now >= staged.staged + FAILED_REST_S and (overdue or census.failed)
        return Effect(reason=f"rebalance to epoch {staged.epoch} failed", unstage=True) if late else None
    blamed = set(census.failed) | ({m for m in census.unprepared if census.record(m) is None} if overdue else set())
    if not overdue and (not blamed or census.now < staged.staged + _pause(staged.attempt)):
        return None
    if blamed and staged.attempt + 1 >= EVICT_ATTEMPT and blamed != set(staged.members):
        ranks = sorted(m.rank for m in blamed)
        return Effect(
            reason=f"ranks {ranks} cannot prepare epoch {staged.epoch}: {'; '.join(census.failed.values())}",
            unstage=True,
            assignments=_without(census, blamed),
        )
    return _staging(census, staged.members, attempt=staged.attempt + 1)


def _pause(attempt: int) -> float:
    return min(RETRY_MAX_S, RETRY_S * 2.0 ** min(attempt, 10))


def _staging(census: Census, members: tuple[Member, ...], attempt: int) -> Effect:
    view = next_view(census, members, bare=attempt > 0)
    operation = census.operation
    if operation is not None and len(members) == operation.target:
        moved = len(moves(census.view.placement, view.placement)) * census.config.expert_bytes
        operation = replace(_until(operation, Phase.LOADING, census.now), bytes_moved=moved)
    else:
        operation = None
    again = f", attempt {attempt + 1}" if attempt else ""
    return Effect(
        reason=f"epoch {view.epoch} with ranks {list(view.ranks)}{again}",
        stage=replace(view, staged=census.now, attempt=attempt),
        operation=operation if operation != census.operation else None,
    )


def _until(operation: Operation, phase: Phase, now: float) -> Operation:
    """Take an operation forward to `phase`, through the phases between; leave it if it is there or beyond."""
    start, end = ORDER.index(operation.phase), ORDER.index(phase)
    skipped = {Phase.SPAWNING, Phase.HANDSHAKING} if operation.phase is Phase.PROPOSED else set()  # it starts no rank
    return advance(operation, *(p for p in ORDER[start + 1 : end + 1] if p not in skipped), now=now)


def _may_start(census: Census, slot: int) -> bool:
    """Whether a new rank may be sent into the slot now."""
    last = census.state.exits.get(slot)
    if slot in census.assigned or (last is not None and (last.quarantined or last.held_back_s(census.now))):
        return False
    lost = census.view.member(slot) is not None  # not before the loss is durable, unless that needs help
    return not lost or not census.keep or _stuck(census)


def _assign(census: Census) -> Effect | None:
    """Send new incarnations into the slots to fill, each to the live agent with the fewest ranks."""
    state = census.state
    incarnation = max([state.incarnation, *(m.incarnation for m in census.members), *(i for _, i in state.ranks)])
    sent: dict[str, list[RankSpec]] = {}
    for slot, node in seats(census, (slot for slot in census.fill if _may_start(census, slot))).items():
        incarnation += 1
        sent.setdefault(node, []).append(RankSpec(rank=slot, incarnation=incarnation, launched=census.now))
    if not sent:
        return None
    operation = census.operation
    if operation is not None:
        proposed = operation.phase is Phase.PROPOSED
        operation = advance(operation, Phase.SPAWNING, now=census.now) if proposed else None
    return Effect(
        reason=f"start ranks {sorted(spec.rank for specs in sent.values() for spec in specs)}",
        assignments=tuple(_extended(state, node, specs) for node, specs in sorted(sent.items())),
        incarnation=incarnation,
        operation=operation,
    )


def _extended(state: ClusterState, node: str, specs: list[RankSpec]) -> Assignment:
    before = state.assignments.get(node, Assignment(node=node))
    return replace(before, ranks=(*before.ranks, *specs), agent_started=state.agents[node].started)


def _progress(census: Census) -> Effect | None:
    """Move an operation on as others do their part."""
    operation = census.operation or census.finishing
    moved = _moved(census, operation) if operation is not None else None
    if moved is None:
        return None
    desired = _chosen(census, census.view) if moved.phase is Phase.COMMITTED else None
    return Effect(reason=f"operation {moved.id} is {moved.phase}", operation=moved, desired=desired)


def _moved(census: Census, operation: Operation) -> Operation | None:
    now = census.now
    late = _late(census, operation)
    if operation.phase is Phase.COMMITTED:
        if census.flipped and census.state.engine_status is not None:
            operation = replace(operation, pause_ms=census.state.engine_status.pause_ms)
        return advance(operation, Phase.RETIRING, now=now) if census.flipped or late else None
    if operation.phase is Phase.RETIRING:
        retired = not census.surplus and not census.lingering
        return advance(operation, Phase.DONE, now=now) if retired or late else None
    if not census.fill and len(census.keep) == len(census.members) == operation.target:
        return advance(operation, Phase.COMMITTED, now=now, epoch=census.view.epoch)
    here = all((m := census.newcomers.get(slot)) and census.record(m.member) for slot in census.fill)
    if operation.phase is Phase.SPAWNING and census.fill and here:
        return advance(operation, Phase.HANDSHAKING, now=now)
    return None


def _follow(census: Census) -> Effect | None:
    """The number of agents sets the size, where it is to."""
    desired = followed(census)
    if desired is None:
        return None
    return Effect(reason=f"{len(desired.nodes)} agents, so {desired.ranks} ranks", desired=desired)


def _rebalance(census: Census) -> Effect | None:
    """In a quiet cluster: the same members with a better placement, a budget's worth at a time."""
    if census.state.next is not None or census.state.paused(census.now) or not quiet(census):
        return None
    better = rebalance(census)
    if better is None or census.now < better.at:
        return None
    view = replace(
        census.view, epoch=census.view.epoch + 1, placement=better.placement, staged=census.now, attempt=0,
        unfinished=better.unfinished, urgent=False,
    )  # fmt: skip
    return Effect(reason=f"epoch {view.epoch}: {better.reason}", stage=view)


RULES: tuple[Callable[[Census], Effect | None], ...] = (
    _commit, _abort, _follow, _drop, _stage, _assign, _progress, _rebalance,
)  # fmt: skip
