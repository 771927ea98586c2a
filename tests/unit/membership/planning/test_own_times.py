"""Waits last as long as they are meant to, whatever the clocks of those who wrote the times say."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from membership.base.enums import OperationKind
from membership.base.timing import CLOCK_SKEW_S
from membership.planning.own_times import REGULAR_S, OwnTimes
from membership.store.records import (
    AgentRecord,
    Assignment,
    ClusterState,
    Operation,
    Pause,
    RankRecord,
    RankSpec,
    RankState,
    RebalanceRequest,
    View,
)

pytestmark = pytest.mark.unit

NOW = 1000.0
HOUR = 3600.0
EMPTY = ClusterState(revision=1)


def written(at: float, revision: int = 2) -> ClusterState:
    """Everything that has a time, written at `at` by some clock: waits of 30 s, a pause of 60 s."""
    spec = RankSpec(rank=0, incarnation=1, launched=at)
    operation = Operation(id="op", kind=OperationKind.SCALE, target=2, started=at, deadline=at + 30)
    return ClusterState(
        revision=revision,
        view=View(epoch=1, staged=at),
        next=View(epoch=2, staged=at),
        agents={"a": AgentRecord(node="a", pid=1, started=at, capacity=1)},
        assignments={"a": Assignment(node="a", ranks=(spec,))},
        operations={"op": operation},
        pause=Pause(since=at, until=at + 60),
        rebalance=RebalanceRequest(at=at + 0.001),
    )


def times(state: ClusterState) -> tuple[float, ...]:
    assert None not in (state.view, state.next, state.pause, state.rebalance)
    operation, (spec,) = state.operations["op"], state.assignments["a"].ranks
    return (
        state.view.staged, state.next.staged, spec.launched, operation.started, operation.deadline - 30,
        state.pause.since, state.pause.until - 60, state.rebalance.at - 0.001,
    )  # fmt: skip


@pytest.mark.parametrize("skew_s", [-HOUR, -60.0, 60.0, HOUR])
def test_what_appears_while_we_look_was_written_now(skew_s: float) -> None:
    clock = OwnTimes()
    clock.own(EMPTY, NOW)
    assert times(clock.own(written(NOW + skew_s), NOW + 1)) == pytest.approx([NOW + 1] * 8, abs=0.01)


@pytest.mark.parametrize("skew_s", [60.0, HOUR])
def test_nothing_was_written_later_than_it_was_first_seen(skew_s: float) -> None:
    clock = OwnTimes()  # a new controller: it finds the records
    assert times(clock.own(written(NOW + skew_s), NOW)) == pytest.approx([NOW] * 8, abs=0.01)


def test_what_a_new_controller_finds_may_be_old() -> None:
    state = written(NOW - HOUR)
    assert OwnTimes().own(state, NOW) is state


def test_clocks_that_agree_are_believed() -> None:
    clock = OwnTimes()
    clock.own(EMPTY, NOW)
    for lag_s in (-1.0, 0.0, 1.0):
        state = written(NOW + lag_s)
        assert clock.own(state, NOW) is state


def test_time_goes_on_after_it_was_moved() -> None:
    clock, state = OwnTimes(), written(NOW + 60)
    moved = [times(clock.own(state, NOW + later_s)) for later_s in (0.0, 1.0, 29.0, 300.0)]
    assert moved == [moved[0]] * 4


def test_our_own_clock_may_jump_back() -> None:
    clock = OwnTimes()
    clock.own(EMPTY, NOW + 60)
    state = written(NOW + 60.5)  # our own record
    assert clock.own(state, NOW + 60.5) is state
    assert times(clock.own(state, NOW + 1)) == pytest.approx([NOW + 1] * 8, abs=0.01)


def test_while_we_look_a_record_grows_as_old_as_it_is() -> None:
    clock, state = OwnTimes(), written(NOW)
    clock.own(EMPTY, NOW - 1)
    assert all(clock.own(state, NOW + later_s) is state for later_s in range(20))


def test_after_our_clock_went_back_a_new_record_may_be_old() -> None:
    clock, state = OwnTimes(), written(NOW - HOUR)
    clock.own(EMPTY, NOW)
    assert clock.own(state, NOW - 0.5) is state


@pytest.mark.parametrize("lag_s", [-REGULAR_S - CLOCK_SKEW_S, CLOCK_SKEW_S])
def test_a_time_is_moved_only_by_more_than_the_skew(lag_s: float) -> None:
    clock, state = OwnTimes(), written(NOW + lag_s)
    clock.own(EMPTY, NOW)
    assert clock.own(replace(state, rebalance=None), NOW).view == state.view


@pytest.mark.parametrize("later_s", [-0.5, 0.5])
def test_a_request_stays_before_or_after_the_view_that_it_was_made_for(later_s: float) -> None:
    at = NOW + HOUR
    state = replace(written(at), rebalance=RebalanceRequest(at=at + later_s))
    moved = OwnTimes().own(state, NOW)
    assert moved.view is not None
    assert moved.rebalance is not None
    assert (moved.rebalance.at > moved.view.staged) == (later_s > 0)


def test_a_record_that_is_written_again_is_looked_at_again() -> None:
    clock = OwnTimes()
    clock.own(written(NOW + 60), NOW)
    again = written(NOW + 1, revision=3)
    assert clock.own(again, NOW + 1) is again


def test_after_a_pause_in_our_looks_a_new_record_may_be_old() -> None:
    clock, state = OwnTimes(), written(NOW + 100)
    clock.own(EMPTY, NOW)
    assert clock.own(state, NOW + 160) is state


def test_a_record_is_missing_from_when_it_was_first_seen_to_be() -> None:
    """A rank that starts has none yet, unless its agent's is gone as well."""
    clock, starting = OwnTimes(), written(NOW)
    assert clock.own(starting, NOW).missing == {}
    registered = replace(
        starting, ranks={(0, 1): RankRecord(rank=0, incarnation=1, node="a", pid=2, state=RankState.LOADING)}
    )
    assert clock.own(registered, NOW + 1).missing == {}
    for later_s in (2.0, 5.0):
        assert clock.own(starting, NOW + later_s).missing == {(0, 1): NOW + 2.0}
    assert clock.own(registered, NOW + 6).missing == {}
    assert clock.own(starting, NOW + 7).missing == {(0, 1): NOW + 7.0}
    assert OwnTimes().own(replace(starting, agents={}), NOW).missing == {(0, 1): NOW}
    assert clock.own(replace(starting, assignments={}), NOW + 8).missing == {}
