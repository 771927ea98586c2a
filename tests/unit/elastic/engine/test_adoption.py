"""When a newer view may be adopted, and how long a loss is felt."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from elastic.engine.adoption import Adoption, adoption, leaving, trigger
from elastic.engine.recovery import Recovered, Recovery
from membership.base.enums import Trigger
from membership.store.records import (
    AgentRecord,
    Assignment,
    ClusterState,
    EngineStatus,
    Member,
    Operation,
    RankExit,
    RankRecord,
    RankSpec,
    RankState,
    View,
)  # fmt: skip
from tests.support.rank_model import config

pytestmark = pytest.mark.unit

VIEW = View(epoch=5, members=tuple(Member(rank=r, node="n", incarnation=10 + r) for r in range(3)))


def state(*present: int, view: View | None = VIEW, **more: Any) -> ClusterState:
    ranks = {
        (r, 10 + r): RankRecord(rank=r, node="n", incarnation=10 + r, pid=1, state=RankState.STANDBY) for r in present
    }
    return ClusterState(revision=9, view=view, ranks=ranks, **more)


def assigned(*ranks: int, agent_started: float = 1.0) -> dict[str, Assignment]:
    specs = tuple(RankSpec(rank=r, incarnation=10 + r) for r in ranks)
    return {"n": Assignment(node="n", ranks=specs, agent_started=agent_started)}


def agent(started: float) -> dict[str, AgentRecord]:
    return {"n": AgentRecord(node="n", pid=1, started=started)}


def exit_of(rank: int, incarnation: int) -> dict[int, RankExit]:
    return {rank: RankExit(rank=rank, incarnation=incarnation, reason="killed", at=1.0)}


def test_no_newer_view_no_adoption() -> None:
    assert adoption(state(0, 1, 2), 5, set(), set()) is None
    assert adoption(state(0, view=None), 0, set(), set()) is None


def test_waits_for_members_that_have_a_record_but_no_queue() -> None:
    assert adoption(state(0, 1, 2), 4, {(0, 10), (2, 12)}, set()) == Adoption(VIEW, (), (1,))


def test_another_incarnation_of_the_slot_is_not_the_member() -> None:
    assert adoption(state(0, 1, 2), 4, {(0, 10), (1, 99), (2, 12)}, {(2, 7)}) == Adoption(VIEW, (), (1,))


def test_the_lost_and_the_absent_are_masked() -> None:
    assert adoption(state(0, 1), 4, {(0, 10)}, {(1, 11)}) == Adoption(VIEW, (1, 2), ())


def test_a_ready_member_is_used_though_its_record_is_missing_for_now() -> None:
    assert adoption(state(0), 4, {(0, 10), (1, 11), (2, 12)}, set()) == Adoption(VIEW, (), ())


def test_who_is_overdue_counts_as_lost() -> None:
    assert adoption(state(0, 1, 2), 4, {(0, 10)}, set(), overdue=True) == Adoption(VIEW, (1, 2), ())


def test_who_has_no_record_for_now_is_waited_for_while_patient() -> None:
    """An engine elected after an outage, before the agents have written the records that lapsed in it."""
    found = adoption(state(0, assignments=assigned(0, 1, 2)), 4, {(0, 10)}, set(), patient=True)
    assert found == Adoption(VIEW, (), (1, 2))
    found = adoption(state(0, assignments=assigned(0, 1, 2)), 4, {(0, 10)}, {(1, 11)}, patient=True)
    assert found == Adoption(VIEW, (1,), (2,))


def test_an_engine_that_says_nothing_of_patience_waits_for_no_absent_member() -> None:
    assert adoption(state(0, assignments=assigned(0, 1, 2)), 4, {(0, 10)}, set()) == Adoption(VIEW, (1, 2), ())


HALF, OTHER_HALF, ALL = ((0,), (0,)), ((1,), (1,)), ((0, 1), (0, 1))


@pytest.mark.parametrize(
    ("placement", "joined", "masked", "waiting_for"),
    [
        ((ALL, ALL, ALL), (0,), (1, 2), ()),
        ((ALL, ALL, ALL), (), (), (0, 1, 2)),  # an outage in which no agent could write: the ranks are well
        ((HALF, OTHER_HALF, HALF), (0,), (), (1, 2)),
        ((HALF, OTHER_HALF, HALF), (0, 1), (2,), ()),
    ],
)
def test_who_has_no_record_is_waited_for_longer_where_experts_would_be_missing(
    placement: tuple[Any, ...], joined: tuple[int, ...], masked: tuple[int, ...], waiting_for: tuple[int, ...]
) -> None:
    known = state(
        config=config(), view=replace(VIEW, placement=dict(enumerate(placement))), assignments=assigned(0, 1, 2)
    )
    ready = {(rank, 10 + rank) for rank in joined}
    found = adoption(known, 4, ready, set())
    assert found is not None
    assert (found.masked, found.waiting_for) == (masked, waiting_for)
    overdue = adoption(known, 4, ready, set(), overdue=True)
    assert overdue is not None
    assert overdue.waiting_for == (), "the controller must hear of it some time"


def test_experts_that_are_missing_without_them_are_no_reason_to_wait_for_others() -> None:
    placement = {0: HALF, 1: HALF, 2: OTHER_HALF}
    known = state(0, config=config(), view=replace(VIEW, placement=placement), assignments=assigned(0, 1))
    assert adoption(known, 4, {(0, 10)}, set()) == Adoption(known.view, (1, 2), ())


@pytest.mark.parametrize(
    "certain",
    [
        {"assignments": assigned(0, 1, 2), "exits": exit_of(2, 12)},
        {"assignments": assigned(0, 1)},  # the controller gave it up; `elastic serve` begins with no assignments at all
        {"assignments": {"n": Assignment(node="n", ranks=(RankSpec(rank=2, incarnation=99),))}},
        {"assignments": assigned(0, 1, 2), "agents": agent(started=2.0)},  # its agent has ended, and it with it
    ],
)
def test_who_has_certainly_ended_is_masked_at_once(certain: dict[str, Any]) -> None:
    found = adoption(state(0, 1, **certain), 4, {(0, 10), (1, 11)}, set(), patient=True)
    assert found == Adoption(VIEW, (2,), ())


def test_an_exit_of_an_earlier_incarnation_in_the_slot_is_not_the_members() -> None:
    known = state(0, 1, assignments=assigned(0, 1, 2), agents=agent(started=1.0), exits=exit_of(2, 8))
    assert adoption(known, 4, {(0, 10), (1, 11)}, set(), patient=True) == Adoption(VIEW, (), (2,))


def test_a_loss_is_over_when_each_moved_request_has_a_token_or_has_ended() -> None:
    recovery = Recovery()
    under_way = {"a", "b", "c"}
    recovery.lost(2, 100.0, ["a", "b", "c"])
    assert recovery.progress(["a", "x"], under_way.__contains__, 100.1) == []
    under_way.remove("b")
    assert recovery.progress([], under_way.__contains__, 100.2) == []
    assert recovery.progress(["c"], under_way.__contains__, 100.5) == [Recovered(2, pytest.approx(500.0), 3)]
    assert recovery.progress(["c"], under_way.__contains__, 101.0) == []


def test_a_loss_that_moved_nothing_is_over_at_once() -> None:
    recovery = Recovery()
    recovery.lost(1, 1.0, [])
    assert recovery.progress([], lambda name: True, 1.002) == [Recovered(1, pytest.approx(2.0), 0)]


def test_a_recovery_says_what_its_time_was_made_up_of() -> None:
    """The step under way, the wait for what the dead rank had left, a step without its requests, one with them."""
    recovery = Recovery()
    recovery.step_began(99.9)
    recovery.lost(2, 100.0, ["a"])
    recovery.step_ended(100.125)
    assert recovery.progress([], lambda name: True, 100.125) == []
    for began, ended, emitted in ((100.25, 100.5, []), (100.5, 101.0, ["a"])):
        recovery.step_began(began)
        recovery.step_ended(ended)
        over = recovery.progress(emitted, lambda name: True, ended)
    assert over == [Recovered(2, 1000.0, 1, steps=3, in_flight_ms=125.0, wait_ms=125.0)]


def test_a_rank_that_was_lost_between_two_steps_had_none_under_way() -> None:
    recovery = Recovery()
    recovery.step_ended(99.0)
    recovery.lost(2, 100.0, ["a"])
    recovery.step_began(100.25)
    recovery.step_ended(100.5)
    assert recovery.progress(["a"], lambda name: True, 100.5) == [Recovered(2, 500.0, 1, steps=1, wait_ms=250.0)]


def without(epoch: int, *ranks: int) -> View:
    return View(epoch=epoch, members=tuple(member for member in VIEW.members if member.rank not in ranks))


@pytest.mark.parametrize(
    ("committed", "staged", "left_out"),
    [
        (None, None, ()),
        (VIEW, None, ()),
        (VIEW, without(6, 1), (1,)),
        (without(6, 1), None, (1,)),
        (without(6, 1), without(7, 1, 2), (1,)),  # what is committed comes first
        (without(4, 1), None, ()),  # an older one says nothing, whether committed
        (VIEW, without(5, 1), ()),  # or staged: it has been overtaken
        (None, without(6, 2), (2,)),
    ],
)
def test_who_leaves_is_who_a_newer_view_leaves_out(
    committed: View | None, staged: View | None, left_out: tuple[int, ...]
) -> None:
    assert leaving(VIEW, state(0, 1, 2, view=committed, next=staged)) == left_out


def test_a_slot_with_another_incarnation_leaves_too() -> None:
    successor = Member(rank=1, node="n", incarnation=99)
    newer = View(epoch=6, members=(VIEW.members[0], successor, VIEW.members[2]))
    assert leaving(VIEW, state(0, 1, 2, view=newer)) == (1,)


@pytest.mark.parametrize(
    ("before", "members", "change"),
    [((0, 1), (0,), Trigger.LOSS), ((0,), (0, 1), Trigger.JOIN), ((0, 1), (1, 0), Trigger.REBALANCE)],
)
def test_what_a_view_is_for_is_seen_from_the_one_in_use(
    before: tuple[int, ...], members: tuple[int, ...], change: Trigger
) -> None:
    old, new = (View(epoch=e, members=tuple(Member(rank=r, node="n", incarnation=r) for r in ranks))
                for e, ranks in ((4, before), (5, members)))  # fmt: skip
    assert trigger(new, state(view=new), old) is change
    asked = state(view=new, operations={"op": Operation(id="op", kind="scale", target=1, epoch=5)})
    assert trigger(new, asked, old) is Trigger.SCALE


def test_a_successor_ends_no_change_that_its_predecessor_may_have_ended() -> None:
    first = View(epoch=1)
    assert trigger(first, state(view=first), None) is Trigger.START
    assert trigger(first, state(view=first, engine_status=EngineStatus(token=1, epoch=1)), None) is None
    assert trigger(VIEW, state(), None) is None
