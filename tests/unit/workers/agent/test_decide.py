"""The agent's decisions: from the cluster's state and its own ranks to what to do, and its failure detector."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from membership.base.rank_id import RankId, SpareId
from membership.base.timing import RECOVERY_FIRST_S
from membership.store.records import (
    AgentRecord,
    Assignment,
    Checkpoint,
    ClusterConfig,
    ClusterState,
    Desired,
    EngineRecord,
    EngineStatus,
    KillRequest,
    Member,
    RankExit,
    RankRecord,
    RankSpec,
    RankState,
    View,
)
from workers.agent.decide import (
    REPORT_WITHIN_S,
    Attach,
    Effect,
    Heartbeat,
    Kill,
    Load,
    LocalRank,
    Phase,
    Prepare,
    Refuse,
    Retire,
    RetireEpoch,
    Spawn,
    advancing,
    decide,
    expert_pieces_to_free,
    heartbeats,
    hung,
    observe,
    peers_of,
    pools_to_free,
    record_of,
    replaced,
    report_due,
    stale_records,
)
from workers.protocol.load_progress import LoadSeen
from workers.protocol.window_client import PIECES

pytestmark = pytest.mark.unit

ME = AgentRecord(node="n", pid=1, started=10.0)
CONFIG = ClusterConfig(cluster="c", model="/m", served_model_name="m", moe_layers=1, experts=2, launch_deadline_s=60)
A, B = RankId(0, 1), RankId(1, 2)


def assigned(*keys: RankId, **more: object) -> ClusterState:
    assignment = Assignment(node="n", ranks=tuple(RankSpec(rank=r, incarnation=i) for r, i in keys), agent_started=10.0)
    return ClusterState(revision=1, config=CONFIG, assignments={"n": assignment}, **more)  # type: ignore[arg-type]


def ready(key: RankId, **more: object) -> LocalRank:
    return LocalRank(key, started=0.0, phase=Phase.READY, exchange_handle=b"x%d" % key.rank, **more)  # type: ignore[arg-type]


def run(state: ClusterState, *ranks: LocalRank, buried: tuple[RankId, ...] = (), now: float = 1.0) -> list[Effect]:
    return decide(state, ME, {rank.key: rank for rank in ranks}, buried, now)


def staged(*ranks: LocalRank, revision: int = 7, **more: object) -> ClusterState:
    """A state with a staged view of A and B, where `ranks` are registered."""
    view = View(epoch=3, members=tuple(Member(rank=r, node="n", incarnation=i) for r, i in (A, B)))
    records = {rank.key: record_of(rank, "n") for rank in ranks}
    return assigned(A, B, next=view, next_revision=revision, ranks=records, **more)


# --- processes


def test_what_is_assigned_and_not_there_is_spawned_all_at_once() -> None:
    assert run(assigned(A, B)) == [Spawn(A), Spawn(B)]
    assert run(assigned(A, B), LocalRank(A, started=0.0)) == [Spawn(B)]


def test_an_incarnation_never_runs_twice() -> None:
    assert run(assigned(A), buried=(A,)) == []
    dead = RankExit(rank=0, incarnation=1, reason="", at=0.0)
    assert run(assigned(A, exits={0: dead})) == []
    assert run(assigned(RankId(0, 2), exits={0: dead})) == [Spawn(RankId(0, 2))]


def test_an_assignment_of_an_earlier_agent_changes_nothing() -> None:
    earlier = msgspec.structs.replace(assigned(A).assignments["n"], agent_started=9.0)
    state = msgspec.structs.replace(assigned(A), assignments={"n": earlier})
    assert run(state) == []
    assert run(state, ready(B)) == []
    assert run(ClusterState(revision=1, config=CONFIG), ready(A)) == []


def test_what_is_not_assigned_any_more_is_retired_once() -> None:
    assert run(assigned(), ready(A)) == [Retire(A)]
    assert run(assigned(), replace(ready(A), phase=Phase.ENDING)) == []
    assert run(assigned(RankId(0, 9)), ready(A)) == [Spawn(RankId(0, 9)), Retire(A)]


def test_a_rank_that_never_gets_ready_is_given_up() -> None:
    starting = LocalRank(A, started=0.0)
    assert run(assigned(A), starting, now=59.0) == []
    assert run(assigned(A), starting, now=61.0) == [Retire(A, failure="not ready within 60 s")]


def test_a_rank_is_killed_on_request_once_and_only_where_that_is_allowed() -> None:
    state = assigned(A, B, kill=KillRequest(rank=1, incarnation=2, by="ann"))
    allowed = msgspec.structs.replace(ME, killable=True)

    def kills(me: AgentRecord, *ranks: LocalRank) -> list[Effect]:
        effects = decide(state, me, {rank.key: rank for rank in ranks}, (), 1.0)
        return [effect for effect in effects if isinstance(effect, Kill)]

    assert kills(allowed, ready(A), ready(B)) == [Kill(B, "ann")]
    assert kills(ME, ready(A), ready(B)) == [], "no operator has allowed it"
    assert kills(allowed, ready(A), ready(B, killed=True)) == [], "its death is not noticed yet"
    assert kills(allowed, ready(RankId(1, 3))) == [], "its successor"
    assert kills(allowed, LocalRank(B, started=0.0)) == [], "there is no process to kill yet"


# --- identity


MINE, OTHER = {"weights": "w1", "kernels": "k"}, {"weights": "w2", "kernels": "k"}
KNOWN = Checkpoint(parts=MINE)


def test_what_has_loaded_another_model_is_refused_before_it_is_prepared() -> None:
    ranks = ready(A, loaded=True, identity=MINE), ready(B, loaded=True, identity=OTHER)
    effects = run(staged(*ranks, checkpoint=KNOWN), *ranks)
    (refused,) = [e for e in effects if isinstance(e, Refuse)]
    assert refused.key == B
    assert "weights (w2 instead of w1)" in refused.reason
    assert [e.key for e in effects if not isinstance(e, Refuse)] == [A], "the other one is prepared"


def test_a_member_is_never_refused() -> None:
    view = View(epoch=1, members=(Member(rank=1, node="n", incarnation=2),))
    assert run(assigned(B, view=view, checkpoint=KNOWN), ready(B, loaded=True, identity=OTHER)) == []


def test_what_ends_anyway_is_not_refused() -> None:
    other = ready(B, loaded=True, identity=OTHER)
    assert run(assigned(B, checkpoint=KNOWN), replace(other, phase=Phase.ENDING)) == []
    assert run(assigned(checkpoint=KNOWN), other) == [Retire(B)]


# --- engine


def with_engine(token: int = 5, **more: object) -> ClusterState:
    engine = EngineRecord(node="n", pid=2, address="", broadcast_handle=b"q", mask_handle=b"m")
    return assigned(A, engine=engine, engine_token=token, **more)


def test_ready_ranks_join_the_engine_and_a_newer_one_after_it() -> None:
    assert run(with_engine(), ready(A)) == [Attach(A, 5, b"q", b"m")]
    assert run(with_engine(), LocalRank(A, started=0.0)) == []
    assert run(with_engine(), ready(A, attaching_token=5)) == []
    assert run(with_engine(), ready(A, attached_token=5)) == []
    assert run(with_engine(8), ready(A, attached_token=5)) == [Attach(A, 8, b"q", b"m")]
    assert run(with_engine(4), ready(A, attached_token=5)) == []


def test_a_failed_join_is_tried_again_later() -> None:
    failed = ready(A, attach_not_before=2.0)
    assert run(with_engine(), failed, now=1.9) == []
    assert run(with_engine(), failed, now=2.0) == [Attach(A, 5, b"q", b"m")]


# --- the staged view


def test_new_members_load_as_soon_as_a_view_names_them() -> None:
    assert run(staged(), ready(A)) == [Load(A, 7), Spawn(B)] or run(staged(), ready(A)) == [Spawn(B), Load(A, 7)]
    assert Load(A, 7) not in run(staged(), ready(A, loading=True))
    outsider = RankId(5, 9)
    state = msgspec.structs.replace(staged(), assignments=assigned(outsider).assignments)
    assert run(state, ready(outsider)) == []


def test_a_new_ranks_experts_give_way_to_interrupted_requests_for_a_while() -> None:
    old, new = ready(A, loaded=True), replace(ready(B, loaded=True), started=100.0)

    def preparing(now: float, token: int = 5, **status: object) -> list[RankId]:
        said = EngineStatus(token=5, epoch=2, **status)  # type: ignore[arg-type]
        effects = run(staged(old, new, engine_token=token, engine_status=said), old, new, now=now)
        return [effect.key for effect in effects if isinstance(effect, Prepare)]

    assert preparing(100.0, recovering=(1,)) == [A], "one that serves takes the call at the end of its step"
    assert preparing(100.0) == [A, B], "nothing is interrupted"
    assert preparing(100.0 + RECOVERY_FIRST_S, recovering=(1,)) == [A, B], "it may be a long prompt"
    assert preparing(99.0, recovering=(1,)) == [A, B], "a clock that was set back keeps nothing waiting"
    assert preparing(100.0, token=6, recovering=(1,)) == [A, B], "an earlier engine said that"


def test_a_new_rank_loads_at_once_whether_or_not_requests_are_interrupted() -> None:
    """And at its usual priority: a thread cannot raise it again, and the cores may be busy for good."""
    new = replace(ready(B), started=100.0)
    for recovering in ((), (1,)):
        status = EngineStatus(token=5, epoch=2, recovering=recovering)
        state = staged(ready(A, loaded=True), engine_status=status, engine_token=5)
        assert run(state, ready(A, loaded=True), new, now=100.0) == [Load(B, 7)]


def test_preparing_waits_until_every_member_is_registered() -> None:
    a, b = ready(A, loaded=True), ready(B, loaded=True)
    assert run(staged(a), a, b) == []
    launching = LocalRank(B, started=0.0)
    assert run(staged(a, launching), a, launching) == []
    state = staged(a, b)
    peers = {0: (1, b"x0"), 1: (2, b"x1")}
    assert state.next is not None
    assert run(state, a, b) == [Prepare(A, 7, state.next, peers), Prepare(B, 7, state.next, peers)]


def test_preparing_waits_until_all_members_have_loaded() -> None:
    a, b = ready(A, loaded=True), ready(B, loading=True)
    assert run(staged(a, b), a, b) == [], "linking has a deadline, and a load has none"
    state = staged(a, replace(b, loading=False, loaded=True))
    assert {type(effect) for effect in run(state, a, replace(b, loaded=True))} == {Prepare}


def test_preparing_is_asked_again_only_for_a_newer_revision() -> None:
    b = ready(B, loaded=True, prepared_revision=7)
    for done in ({"preparing_revision": 7}, {"prepared_revision": 7}, {"failed_revision": 7}):
        a = ready(A, loaded=True, **done)
        assert run(staged(a, b), a, b) == []
        again = run(staged(a, b, revision=8), a, b)
        assert [e.revision for e in again if isinstance(e, Prepare)] == [8, 8]


def test_another_incarnation_of_a_member_is_no_peer() -> None:
    a, b = ready(A), ready(RankId(1, 99))
    state = staged(a, b)
    assert state.next is not None
    assert peers_of(state.next, state) is None


# --- retiring an epoch


def test_an_epoch_is_retired_when_the_engine_uses_it_and_nothing_is_staged() -> None:
    view = View(epoch=3, members=(Member(rank=0, node="n", incarnation=1),))
    status = EngineStatus(token=5, epoch=3)
    a = ready(A, attached_token=5, prepared_revision=7, loaded=True)
    asked = [RetireEpoch(A, 3, (3, 7))]
    assert run(with_engine(view=view, engine_status=status), a) == asked
    assert run(with_engine(view=view, engine_status=EngineStatus(token=5, epoch=2)), a) == []
    assert run(with_engine(view=view, engine_status=EngineStatus(token=4, epoch=3)), a) == []
    assert run(with_engine(view=view, engine_status=status), replace(a, retired=(3, 7))) == []
    aborted_since = replace(a, retired=(3, 7), prepared_revision=9)
    assert run(with_engine(view=view, engine_status=status), aborted_since) == [RetireEpoch(A, 3, (3, 9))]
    during = with_engine(view=view, engine_status=status, next=view, next_revision=7)
    assert run(during, a) == []


# --- records and the failure detector


def test_the_record_shows_how_far_a_rank_is() -> None:
    steps = [
        (LocalRank(A, started=0.0), RankState.LAUNCHING),
        (ready(A), RankState.HANDSHAKING),
        (ready(A, loading=True), RankState.LOADING),
        (ready(A, loaded=True, preparing_revision=7), RankState.LOADING),
        (ready(A, loaded=True, prepared_revision=7), RankState.STANDBY),
    ]
    assert [record_of(rank, "n").state for rank, _ in steps] == [state for _, state in steps]


def test_records_of_an_earlier_agent_are_stale() -> None:
    mine, other = record_of(ready(A), "n"), RankRecord(rank=1, node="m", incarnation=2, pid=1, state=RankState.STANDBY)
    state = assigned(A, ranks={A: mine, B: other})
    assert stale_records(state, "n", {}) == [A]
    assert stale_records(state, "n", {A: ready(A)}) == []


def test_a_rank_that_stands_still_is_hung_only_after_several_looks_over_the_whole_time() -> None:
    heartbeat = observe(Heartbeat(-1, 0.0), 5, 1.0)
    assert advancing(heartbeat)
    for at in (2.0, 3.0, 4.0):
        heartbeat = observe(heartbeat, 5, at)
        assert not advancing(heartbeat)
        assert not hung(heartbeat, at, after_s=3.0)
    heartbeat = observe(heartbeat, 5, 4.5)
    assert hung(heartbeat, 4.5, after_s=3.0)
    assert advancing(observe(heartbeat, 6, 5.0))


def test_an_agent_that_was_itself_stopped_does_not_blame_its_ranks() -> None:
    heartbeat = observe(Heartbeat(-1, 0.0), 5, 1.0)
    assert not hung(observe(heartbeat, 5, 100.0), 100.0, after_s=3.0), "one look after a long pause proves nothing"


def test_heartbeats_are_published_in_the_time_of_day() -> None:
    ranks = {A: Heartbeat(7, 90.0), B: Heartbeat(-1, 95.0)}
    loading = {A: LoadSeen(loading=True, done=3, total=8, marks=5), SpareId(1): LoadSeen(True, 1, 2, 3)}
    published = heartbeats("n", ranks, loading, now=100.0, wall=5000.0)
    assert (published.node, published.at) == ("n", 5000.0)
    assert published.beats == {A[1]: 4990.0}, "a rank that was not looked at yet has no heartbeat yet"
    assert published.loads == {A[1]: (3, 8)}, "a spare is no rank"


# --- pools of ranks that have ended


def serving(token: int = 3, **status: object) -> ClusterState:
    """The engine with token 3 uses view 5 of A and B, unless `status` says otherwise."""
    members = tuple(Member(rank=key.rank, node="n", incarnation=key.incarnation) for key in (A, B))
    seen = EngineStatus(**({"token": token, "epoch": 5} | status))  # type: ignore[arg-type]
    return assigned(A, B, view=View(epoch=5, members=members), engine_token=3, engine_status=seen)


def test_a_pool_is_kept_until_the_engine_has_noticed_the_death() -> None:
    assert pools_to_free(serving(), [B]) == []
    assert pools_to_free(serving(masked=(1,)), [B]) == [B]


def test_a_pool_is_kept_as_long_as_the_engine_reads_it() -> None:
    assert pools_to_free(serving(masked=(1,), reading=(B,)), [A, B]) == []
    assert pools_to_free(serving(masked=(0, 1), reading=(B,)), [A, B]) == [A]


def test_pools_of_processes_that_the_engine_never_used_are_freed() -> None:
    others = [RankId(1, 1), SpareId(4)]
    assert pools_to_free(serving(), others) == others
    assert pools_to_free(assigned(A, B), [A]) == [A], "there is no engine"


def test_a_pool_is_kept_while_the_engine_is_behind_the_view() -> None:
    """It may be a member of the older view, whose death the engine has yet to notice."""
    assert pools_to_free(serving(epoch=4), [RankId(2, 9)]) == []


def test_a_new_engine_needs_no_pool() -> None:
    assert pools_to_free(serving(token=2, masked=(1,), reading=(B,)), [B]) == [B]


def test_ranks_report_what_they_have_prepared_when_the_last_one_here_has() -> None:
    done, busy = ready(A, preparing_revision=7, prepared_revision=7), ready(B, preparing_revision=7)
    since = {A: 100.0}
    assert not report_due({A: done, B: busy}, since, 100.5)
    assert report_due({A: done, B: replace(busy, prepared_revision=7)}, since, 100.5)
    assert report_due({A: done, B: replace(busy, failed_revision=7)}, since, 100.5)
    assert report_due({A: done, B: replace(busy, phase=Phase.ENDING)}, since, 100.5)
    assert report_due({A: done}, since, 100.5)
    assert not report_due({A: done}, {}, 100.5)


def test_a_rank_that_still_does_an_earlier_view_is_not_waited_for() -> None:
    done, newcomer = ready(A, preparing_revision=9, prepared_revision=9), ready(B, preparing_revision=7)
    assert report_due({A: done, B: newcomer}, {A: 100.0}, 100.0)


def test_the_end_of_a_preparation_that_was_replaced_says_nothing() -> None:
    rank = ready(A, preparing_revision=9)
    assert replaced(rank, 7)
    assert not replaced(rank, 9)


def test_a_rank_that_prepares_for_long_does_not_hide_what_the_others_have_done() -> None:
    ranks = {A: ready(A, preparing_revision=7, prepared_revision=7), B: ready(B, preparing_revision=7)}
    assert report_due(ranks, {A: 100.0}, 100.0 + REPORT_WITHIN_S)


def test_memory_of_experts_stays_for_slots_that_this_host_fills_or_will_fill() -> None:
    pieces = {slot: [slot * PIECES, slot * PIECES + 1] for slot in range(4)}
    every = [number for each in pieces.values() for number in each]
    left = {slot: RankExit(rank=slot, incarnation=9, reason="", at=1.0, quarantined=slot == 1) for slot in (1, 2)}
    state = assigned(A, desired=Desired(ranks=3, slots=(0, 1, 2)), exits=left)
    assert expert_pieces_to_free(state, "n", every) == pieces[1] + pieces[3], "1 is set aside, nobody wants 3"
    moved = msgspec.structs.replace(state.assignments["n"], node="m")
    elsewhere = msgspec.structs.replace(state, assignments={"m": moved}, exits={})
    assert expert_pieces_to_free(elsewhere, "n", pieces[0] + pieces[2]) == pieces[0]


def test_memory_of_experts_stays_while_it_is_not_known_what_is_wanted() -> None:
    assert expert_pieces_to_free(assigned(), "n", [0, PIECES]) == []


def test_a_rank_that_is_to_go_keeps_its_experts_until_it_has_gone() -> None:
    assert expert_pieces_to_free(assigned(A, B, desired=Desired(ranks=1, slots=(0,))), "n", [PIECES]) == []
