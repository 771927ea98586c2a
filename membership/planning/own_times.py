"""The times in records, on this controller's own clock: clocks of two processes are never compared as they are.

Two facts hold whatever the clocks say. No record was written later than it was first seen; and what appears while this
process looks regularly was written just now. A time that contradicts them by more than the tolerated skew is moved, so
a wait lasts as long as it was meant to if the writer's clock is wrong, or the reader's, or jumps. Times of exit records
are left: `RankExit.held_back_s` bounds what they can do.

No record says since when one is missing, so this process counts from when it first saw that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from membership.base.rank_id import RankId
from membership.base.timing import CLOCK_SKEW_S
from membership.store.records import ClusterState, Operation, RankSpec, View

REGULAR_S = 2.0
"""Looks are regular if they follow each other within this time; after a longer pause a new record may be old."""

Written = tuple[str, float]
"""What a time belongs to, and the time as its record has it."""


class OwnTimes:
    """By how much each time in the state is moved. One per mirror: it must know which records were there before."""

    def __init__(self) -> None:
        self._offsets: dict[Written, float] = {}
        self._looked_at: float | None = None
        self._registered: set[RankId] = set()  # assigned ranks that have had a record
        self._missing: dict[RankId, float] = {}

    def own(self, state: ClusterState, now: float) -> ClusterState:
        """`state` with its times on our clock; call it at each look. `now`: our time of day."""
        regular = self._looked_at is not None and 0.0 <= now - self._looked_at <= REGULAR_S
        self._offsets = {each: self._offset(each, now, regular) for each in _written(state)}
        self._looked_at = now
        moved = _moved(state, self._offsets) if any(self._offsets.values()) else state
        missing = self._since(state, now)
        return replace(moved, missing=missing) if missing else moved

    def _since(self, state: ClusterState, now: float) -> dict[RankId, float]:
        """Assigned ranks whose record was there, or whose agent's is not, and since when they have none."""
        assigned = {spec.id: node for node, each in state.assignments.items() for spec in each.ranks}
        self._registered = {id for id in assigned if id in state.ranks or id in self._registered}
        gone = (id for id, node in assigned.items() if node not in state.agents or id in self._registered)
        self._missing = {id: min(now, self._missing.get(id, now)) for id in gone if id not in state.ranks}
        return self._missing

    def _offset(self, written: Written, now: float, regular: bool) -> float:
        known = self._offsets.get(written)
        age_s = now - written[1] - (known or 0.0)
        new = known is None and regular
        contradicts = age_s < -CLOCK_SKEW_S or (new and age_s > REGULAR_S + CLOCK_SKEW_S)
        return now - written[1] if contradicts else known or 0.0


def _written(state: ClusterState) -> Iterator[Written]:
    """Each time that a decision compares with the clock."""
    if state.view is not None:
        yield "view", state.view.staged
    if state.next is not None:
        yield "next", state.next.staged
    if state.pause is not None:
        yield "pause", state.pause.since
    if state.rebalance is not None:
        yield "rebalance", state.rebalance.at
    for id, operation in state.operations.items():
        if operation.active:
            yield id, operation.started
    for assignment in state.assignments.values():
        for spec in assignment.ranks:
            yield str(spec.id), spec.launched


def _moved(state: ClusterState, offsets: Mapping[Written, float]) -> ClusterState:
    def view(name: str, each: View | None) -> View | None:
        return each and replace(each, staged=each.staged + offsets[name, each.staged])

    def spec(each: RankSpec) -> RankSpec:
        return replace(each, launched=each.launched + offsets[str(each.id), each.launched])

    def operation(each: Operation) -> Operation:
        by = offsets.get((each.id, each.started), 0.0)
        return replace(each, started=each.started + by, deadline=each.deadline + by if each.deadline else 0.0)

    own = replace(
        state,
        view=view("view", state.view),
        next=view("next", state.next),
        operations={id: operation(each) for id, each in state.operations.items()},
        assignments={n: replace(each, ranks=tuple(map(spec, each.ranks))) for n, each in state.assignments.items()},
    )
    if (pause := state.pause) is not None:
        by = offsets["pause", pause.since]
        own = replace(own, pause=replace(pause, since=pause.since + by, until=pause.until + by))
    if (request := state.rebalance) is not None:
        at = request.at + offsets["rebalance", request.at]
        if state.view is not None and own.view is not None and request.at > state.view.staged:
            at = max(at, own.view.staged + 0.001)  # it stays a request about this view
        own = replace(own, rebalance=replace(request, at=at))
    return own
