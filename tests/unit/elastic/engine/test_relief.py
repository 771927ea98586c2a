"""Requests wait for lost experts for as long as these may be on their way, and are given up soon after none are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from chaos.simulation.kv_model import reply
from elastic.engine.loop import Engine, Peers
from elastic.engine.relief import Relief
from elastic.engine.scheduler import Scheduler
from elastic.protocol import Rejected
from membership.base.rank_id import RankId
from membership.base.timing import STORE_SILENCE_S
from membership.store.records import (
    AgentRecord,
    Assignment,
    ClusterState,
    Member,
    RankExit,
    RankRecord,
    RankSpec,
    RankState,
    View,
)
from tests.support.rank_model import TOKEN, Client, ask, config, view
from workers.protocol.messages import StepStatus

pytestmark = pytest.mark.unit

IN_USE = View(epoch=5, members=(Member(rank=0, node="n", incarnation=10), Member(rank=1, node="n", incarnation=11)))
NEXT = View(epoch=6, members=(Member(rank=0, node="n", incarnation=10),))
NOW = 1000.0


def state(*newcomers: int, launched: float = NOW, agents: tuple[str, ...] = ("n",), **more: Any) -> ClusterState:
    """`newcomers`: incarnations in slot 1, beside the rank of slot 0 that lives."""
    specs = RankSpec(rank=0, incarnation=10), *(RankSpec(rank=1, incarnation=i, launched=launched) for i in newcomers)
    known = {"view": IN_USE, "config": config(), "assignments": {"n": Assignment(node="n", ranks=specs)}}
    there = {name: AgentRecord(node=name, pid=1, started=0.0) for name in agents}
    return ClusterState(revision=9, agents=there, **(known | more))


def exit_of(incarnation: int) -> dict[int, RankExit]:
    return {1: RankExit(rank=1, incarnation=incarnation, reason="killed", at=NOW)}


def record(incarnation: int, found: RankState, **more: Any) -> dict[RankId, RankRecord]:
    return {RankId(1, incarnation): RankRecord(rank=1, incarnation=incarnation, node="n", pid=1, state=found, **more)}


@pytest.mark.parametrize(
    ("cluster", "near"),
    [
        (state(), False),
        (state(exits=exit_of(11)), False),
        (state(12, exits=exit_of(11)), True),
        (state(12, agents=()), False),
        (state(12, agents=(), ranks=record(12, RankState.LOADING)), True),
        (state(12, launched=NOW - 3600, ranks=record(12, RankState.LOADING)), True),  # its agent ends one that stalls
        (state(12, launched=NOW - 3600, ranks=record(12, RankState.LAUNCHING)), False),
        (state(12, exits=exit_of(12)), False),
        (state(13, exits=exit_of(12)), False),  # the one before has died since the view, too
        (state(view=NEXT), True),
        (state(next=NEXT, next_revision=8), True),
        (state(next=View(epoch=6, members=NEXT.members, attempt=1), next_revision=8), False),
        (state(12, view=None), True),
    ],
)
def test_what_starts_or_is_prepared_is_on_its_way_until_it_has_failed_once(cluster: ClusterState, near: bool) -> None:
    assert Relief().is_near(cluster, IN_USE.epoch, NOW) is near


def test_a_view_that_a_member_cannot_prepare_is_no_relief() -> None:
    unable = RankRecord(
        rank=0, incarnation=10, node="n", pid=1, state=RankState.STANDBY, failed_revision=8, prepare_error="no bytes"
    )
    cluster = state(next=NEXT, next_revision=8, ranks={RankId(0, 10): unable})
    assert not Relief().is_near(cluster, IN_USE.epoch, NOW)


def unable(incarnation: int) -> dict[RankId, RankRecord]:
    return record(incarnation, RankState.STANDBY, failed_revision=8, prepare_error="no bytes")


def with_newcomer(incarnation: int, attempt: int = 0) -> dict[str, Any]:
    members = (*NEXT.members, Member(rank=1, node="n", incarnation=incarnation))
    return {"next": View(epoch=6, members=members, attempt=attempt), "next_revision": 8, "exits": exit_of(11)}


@pytest.mark.parametrize("attempt", [0, 1, 7])
def test_nor_is_one_that_a_newcomer_cannot_prepare(attempt: int) -> None:
    cluster = state(12, ranks=unable(12), **with_newcomer(12, attempt))
    assert not Relief().is_near(cluster, IN_USE.epoch, NOW)


def test_a_newcomer_is_none_whose_view_failed_by_another_and_one_that_still_loads_is() -> None:
    known = {**record(12, RankState.STANDBY), RankId(0, 10): unable(12)[RankId(1, 12)]}
    assert not Relief().is_near(state(12, ranks=known, **with_newcomer(12, 1)), IN_USE.epoch, NOW)
    loads = state(12, next=View(epoch=6, members=NEXT.members, attempt=1), next_revision=8)
    assert Relief().is_near(loads, IN_USE.epoch, NOW)


def test_the_next_process_of_a_slot_that_could_not_prepare_is_counted_on_no_more_until_a_view_is_adopted() -> None:
    """The first one was unassigned: no exit record tells of it."""
    relief = Relief()
    assert relief.is_near(state(12, **with_newcomer(12)), IN_USE.epoch, NOW)
    assert not relief.is_near(state(12, ranks=unable(12), **with_newcomer(12, 2)), IN_USE.epoch, NOW)
    loads, staged = state(13, exits=exit_of(11)), state(13, **with_newcomer(13))
    assert not relief.is_near(loads, IN_USE.epoch, NOW)
    assert not relief.is_near(staged, IN_USE.epoch, NOW)
    adopted = View(epoch=6, members=IN_USE.members)
    assert relief.is_near(state(13, view=adopted, exits=exit_of(11)), adopted.epoch, NOW)


def test_a_rank_that_serves_and_failed_once_takes_relief_from_no_later_view() -> None:
    """It is in each of them; a read or a dial may fail once."""
    relief = Relief()
    failed = {RankId(0, 10): unable(12)[RankId(1, 12)]}
    assert not relief.is_near(state(12, ranks=failed, **with_newcomer(12)), IN_USE.epoch, NOW)
    retried = with_newcomer(12, 1) | {"next_revision": 9}
    assert not relief.is_near(state(12, ranks=failed, **retried), IN_USE.epoch, NOW), "counted on once"
    fresh = with_newcomer(13) | {"next_revision": 10}
    assert relief.is_near(state(13, ranks=failed, **fresh), IN_USE.epoch, NOW)


def test_nothing_is_on_its_way_while_the_store_is_away() -> None:
    loads = state(12, exits=exit_of(11), ranks=record(12, RankState.LOADING))
    assert Relief().is_near(loads, IN_USE.epoch, NOW, STORE_SILENCE_S - 0.1)
    assert not Relief().is_near(loads, IN_USE.epoch, NOW, STORE_SILENCE_S)
    assert Relief().is_near(state(12), IN_USE.epoch - 1, NOW, STORE_SILENCE_S), "it is committed"


def test_a_request_waits_while_relief_is_near_and_has_its_time_anew_when_experts_are_back() -> None:
    scheduler, client = Scheduler(config(max_wait_s=120.0), TOKEN), Client()
    scheduler.set_view(view(1, {0: 10, 1: 11}), [], 0.0)
    client.submit(scheduler, ask("ran", [4]), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    for rank in batch.ranks:
        scheduler.apply(reply(batch, rank, 10 + rank, status=StepStatus.COVERAGE_LOST), 0.0)
    scheduler.set_view(view(2, {0: 10, 1: 11}, covered=False), [], 1.0)
    client.submit(scheduler, ask("new", [4]), 2.0)
    assert scheduler.expire(200.0, relief_at=180.0) == []
    scheduler.set_view(view(3, {0: 10, 1: 11}), [], 201.0)
    assert scheduler.expire(202.0, relief_at=180.0) == [], "neither for what is past, nor for want of a place"


def test_it_is_given_up_once_nothing_has_been_on_its_way_for_so_long() -> None:
    scheduler, client = Scheduler(config(), TOKEN), Client()
    client.submit(scheduler, ask("r", [4]), 0.0)
    assert scheduler.expire(129.9, relief_at=100.0) == []
    (rejected,) = scheduler.expire(130.0, relief_at=100.0)
    assert isinstance(rejected, Rejected)
    assert rejected.status == 503


@pytest.mark.parametrize("then", ["it has died", "the store is away"])
def test_the_engine_asks_while_it_may_run_no_step(then: str) -> None:
    """First a rank loads, then nothing is on its way any more."""
    now, known, sent = [0.0], [state(12, view=None)], list[Any]()
    server = SimpleNamespace(take=list, send=sent.extend, pending=False)
    status = SimpleNamespace(fenced=False, update=lambda _: None, publish_loads=lambda _: None)
    fleet = SimpleNamespace(collect=lambda *_: [], far_links=dict, slow={})
    mirror = SimpleNamespace(state=lambda: known[0], staleness_s=0.0)
    peers: Any = SimpleNamespace(mirror=mirror, fleet=fleet, server=server, status=status, events=None, gone=set)
    engine = Engine(config(), TOKEN, cast(Peers, peers), clock=lambda: now[0], wall=lambda: NOW)
    engine._scheduler.submit(ask("r", [4]), 0.0)

    def refused_at(at_s: float) -> list[int]:
        now[0] = at_s
        engine._expire()
        engine._flush()
        return [each.status for each in sent]

    assert [refused_at(at_s) for at_s in (0.0, 40.0, 80.0)] == [[], [], []]
    if then == "it has died":
        known[0] = state(view=None, exits=exit_of(12))
    else:
        mirror.staleness_s = STORE_SILENCE_S
    assert [refused_at(at_s) for at_s in (109.0, 110.0)] == [[], [503]]
