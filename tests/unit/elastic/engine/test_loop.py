"""The engine's loop: what it looks at before it starts a step."""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chaos.simulation.kv_model import KvModel
from elastic.engine.loop import Engine, Peers
from elastic.protocol import Tokens
from membership.base.enums import DetectedBy
from membership.base.errors import Fenced
from membership.base.rank_id import RankId
from membership.store.records import ClusterState
from tests.support.rank_model import TOKEN, ask, config, view
from workers.fleet.fleet import FleetEvent, RankLost
from workers.protocol.messages import CopyBlocks, StepBatch, StepResult, StepStatus

pytestmark = pytest.mark.unit


def engine_in(state: ClusterState, events: object = None, gone: Callable[[Set[RankId]], Set[RankId]] = set) -> Engine:
    """An engine without requests, whose status writer has noticed nothing."""
    server = SimpleNamespace(take=list, send=lambda _: pytest.fail("it goes on"))
    mirror, status = SimpleNamespace(state=lambda: state), SimpleNamespace(fenced=False)
    fleet = SimpleNamespace(awaited=frozenset(), meet=lambda _: None)
    peers: Any = SimpleNamespace(mirror=mirror, fleet=fleet, server=server, status=status, events=events, gone=gone)
    return Engine(config(), TOKEN, cast(Peers, peers))


@pytest.mark.parametrize(("token", "by"), [(TOKEN + 1, str(TOKEN + 1)), (0, "none yet")])
def test_an_engine_that_sees_another_token_in_the_store_starts_no_step(token: int, by: str) -> None:
    with pytest.raises(Fenced, match=f"engine {TOKEN} has been replaced by {by}"):
        engine_in(ClusterState(revision=9, engine_token=token)).turn()


def test_members_without_a_record_that_do_not_listen_are_not_waited_for() -> None:
    """They are asked for once there is a view to adopt, and only those that have not joined this engine."""
    asked: list[Set[RankId]] = []
    next_view = view(1, {0: 1, 1: 2})

    def gone(members: Set[RankId]) -> Set[RankId]:
        asked.append(members)
        return {RankId(1, 2)}

    state = ClusterState(revision=9, engine_token=TOKEN, view=next_view)
    engine = engine_in(state, gone=gone)
    engine._ready.add(RankId(0, 1))
    assert engine._given_up(state) == {RankId(1, 2)}
    assert asked == [{RankId(1, 2)}]
    engine._scheduler.set_view(next_view, (), 0.0)
    assert (engine._given_up(state), len(asked)) == (set(), 1), "it uses that view already"


def test_a_link_that_is_cut_and_that_is_back_is_reported_with_the_peer() -> None:
    seen: list[tuple[str, int, int, str]] = []

    def emit(kind: str, *, rank: int, peer: int, peer_node: str, **_: object) -> None:
        seen.append((kind, rank, peer, peer_node))

    engine, used = engine_in(ClusterState(revision=1), SimpleNamespace(emit=emit)), view(1, {0: 1, 1: 2})
    engine._scheduler.set_view(used, (), 0.0)
    for unlinked in ([1], [1], [1], []):
        engine._handle([StepResult(0, 1, TOKEN, 1, 5, 0, StepStatus.OK, unlinked=unlinked)])
    node = used.members[1].node
    assert node
    assert seen == [("link_lost", 0, 1, node), ("link_back", 0, 1, node)]


class Ranks:
    """Two ranks of one host, each of which takes one message after the other; and what else an engine talks to."""

    def __init__(self) -> None:
        self.members, self.dying = {0: 10, 1: 11}, False
        self.kv, self.happened = KvModel(4), list[FleetEvent]()
        self.log: list[tuple[str, object]] = []
        self.slow: dict[int, float] = {}
        self.awaited = frozenset[RankId]()
        self.fenced = self.pending = False

    def broadcast(self, batch: StepBatch) -> None:
        self.log.append(("step", sorted(chunk.seq for chunks in batch.ranks.values() for chunk in chunks)))
        answers = self.kv.run(batch, self.members)
        if self.dying:  # rank 1, with its answer unsaid
            self.happened.append(RankLost(RankId(1, self.members[1]), DetectedBy.ROBUST_FUTEX, 0.0, ended=True))
        self.happened += [answer for answer in answers if answer.rank != 1 or not self.dying]
        self.dying = False

    def copy(self, order: CopyBlocks) -> None:
        self.log.append(("copy", len(order.blocks)))
        self.happened.append(self.kv.copy(order, 1))

    def collect(self, timeout_s: float, or_when: object) -> list[FleetEvent]:
        happened, self.happened = self.happened, []
        assert happened, "it waits for nothing"
        return happened

    def send(self, outputs: list[Tokens]) -> None:
        self.log += [("token", each.request_id) for each in outputs]

    def take(self) -> list[object]:
        return []

    def far_links(self) -> dict[RankId, object]:
        return {}

    def ignore(self, *args: object, **fields: object) -> None:
        """Not looked at here."""

    mask = update = emit = meet = ring = ignore


def in_a_step(ranks: Any, status: Any, **settings: int) -> Engine:
    """An engine of these ranks in its first step, with two requests."""
    mirror: Any = SimpleNamespace(state=lambda: ClusterState(revision=1, engine_token=TOKEN))
    engine = Engine(config(**settings), TOKEN, Peers(mirror, ranks, ranks, status, ranks), clock=lambda: 0.0)
    engine._scheduler.set_view(view(1, ranks.members), (), 0.0)
    for first, name in enumerate("ab"):
        engine._scheduler.submit(ask(name, [first] * 14, 20, ignore_eos=True), 0.0)
    engine.turn()
    return engine


def recovering_in(seen: list[tuple[int, ...]]) -> SimpleNamespace:
    """A status that notes which ranks' requests are being recovered."""
    return SimpleNamespace(fenced=False, update=lambda status: seen.append(status.recovering))


def test_the_step_after_a_death_has_all_requests_and_no_token_waits_for_it() -> None:
    """What the dead rank has left is read before it, from its death on, however many pieces that takes."""
    ranks: Any = Ranks()
    engine = in_a_step(ranks, ranks, max_batched_tokens=50)
    ranks.dying = True
    engine.turn()
    assert ranks.log == [("step", [1, 2]), ("step", [1, 2]), ("token", "a"), ("token", "b"), ("copy", 4)]
    ranks.log.clear()
    while ranks.log[-1:] != [("step", [1, 2])]:
        engine.turn()
    pieces = [("token", "a"), ("copy", 3), ("copy", 2), ("copy", 1)]
    assert ranks.log == [*pieces, ("step", [1, 2])]


def test_new_ranks_give_way_until_interrupted_requests_go_on_unless_these_wait_for_them() -> None:
    ranks: Any = Ranks()
    seen: list[tuple[int, ...]] = []
    engine = in_a_step(ranks, recovering_in(seen))
    assert seen[-1] == ()
    ranks.dying = True
    engine.turn()
    assert seen[-1] == (1,)
    while seen[-1]:
        engine.turn()
    steps = [each for each in ranks.log if each[0] == "step"]
    assert steps[-2:] == [("step", [1, 2])] * 2, "it is told beside the step after theirs"
    engine._lose(RankLost(RankId(0, 10), DetectedBy.ROBUST_FUTEX, 0.0, ended=True))
    assert seen[-1] == (), "no rank is left, so they wait for the replacement"


def test_what_a_rank_had_answered_before_its_death_is_sent_then_and_is_no_recovery() -> None:
    ranks: Any = Ranks()
    seen: list[tuple[int, ...]] = []
    engine = in_a_step(ranks, recovering_in(seen))
    batch = engine._scheduler.schedule(0.0)
    assert batch is not None
    engine._begin_step(batch)
    (other,) = (each for each in ranks.happened if each.rank == 0)
    ranks.log.clear()
    engine._handle([next(each for each in ranks.happened if each.rank == 1)])
    engine._handle([RankLost(RankId(1, 11), DetectedBy.ROBUST_FUTEX, 0.0, ended=True)])
    assert ranks.log[0] == ("token", "b")
    ranks.happened = []
    engine._handle([other])
    engine._end_step()
    engine._report()
    assert seen[-1] == (1,), "it has no token since"


def test_a_second_death_sends_what_the_first_ones_recovery_waits_for_and_ends_it() -> None:
    """In the step in which the moved request is answered another rank dies."""
    ranks: Any = Ranks()
    ranks.members = {0: 10, 1: 11, 2: 12}
    seen: list[tuple[int, ...]] = []
    status: Any = SimpleNamespace(fenced=False, update=lambda status: seen.append(status.recovering))
    mirror: Any = SimpleNamespace(state=lambda: ClusterState(revision=1, engine_token=TOKEN))
    engine = Engine(config(max_batched_tokens=50), TOKEN, Peers(mirror, ranks, ranks, status, ranks), clock=lambda: 0.0)
    engine._scheduler.set_view(view(1, ranks.members), (), 0.0)
    for first, name in enumerate("abc"):
        engine._scheduler.submit(ask(name, [first] * 14, 20, ignore_eos=True), 0.0)
    engine.turn()
    engine._lose(RankLost(RankId(1, 11), DetectedBy.ROBUST_FUTEX, 0.0))
    batch = engine._scheduler.schedule(0.0)
    assert batch is not None
    engine._begin_step(batch)
    (home,) = (rank for rank, chunks in batch.ranks.items() if any(chunk.seq == 2 for chunk in chunks))
    (other,) = {0, 2} - {home}
    engine._handle([answer for answer in ranks.happened if answer.rank == home])
    engine._lose(RankLost(RankId(other, ranks.members[other]), DetectedBy.ROBUST_FUTEX, 0.0))
    assert seen[-1] == (other,)


def test_between_two_steps_nothing_is_done_that_can_wait() -> None:
    """GPUs wait for it there: tokens and status go out once the next step is under way."""
    ranks: Any = Ranks()
    ranks.update = lambda status: ranks.log.append(("status", status.step))
    engine = in_a_step(ranks, ranks, max_batched_tokens=50)
    engine.turn()
    step, tokens = ("step", [1, 2]), [("token", "a"), ("token", "b")]
    assert ranks.log == [step, ("status", 1), step, *tokens, ("status", 2)]


class WaitedFor(Ranks):
    """Notes what wakes the engine that waits for their answers."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = [lambda: None]
        self.woken: list[bool] = []

    def collect(self, timeout_s: float, or_when: Callable[[], bool]) -> list[FleetEvent]:  # type: ignore[override]
        for change in self.changes:
            change()
            self.woken.append(or_when())
        return super().collect(timeout_s, or_when)


def test_in_a_step_only_what_is_taken_in_then_wakes_the_engine() -> None:
    """Members are followed between steps. Were it woken by their change, it would turn until a long step's end, on a
    core that the ranks need."""
    ranks: Any = WaitedFor()
    mirror: Any = SimpleNamespace(state=lambda: ClusterState(revision=1, engine_token=TOKEN))
    engine = Engine(config(), TOKEN, Peers(mirror, ranks, ranks, ranks, ranks), clock=lambda: 0.0)
    engine._scheduler.set_view(view(1, ranks.members), (), 0.0)
    engine._scheduler.submit(ask("a", [1] * 14, 20, ignore_eos=True), 0.0)
    ranks.changes = [lambda: None, engine.look_again, partial(setattr, ranks, "fenced", True),
                     partial(setattr, ranks, "pending", True)]  # fmt: skip
    engine.turn()
    assert ranks.woken == [False, False, False, True]
    with pytest.raises(Fenced):
        engine.turn()


class SlowRanks(Ranks):
    """Each answer to more than 20 tokens of a prompt is overdue."""

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[int] = []

    def broadcast(self, batch: StepBatch) -> None:
        ((rank, (chunk,)),) = batch.ranks.items()
        self.tried.append(len(chunk.tokens))
        if self.tried[-1] > 20:
            self.happened.append(RankLost(RankId(rank, self.members.pop(rank)), DetectedBy.DEADLINE, 0.0))
        else:
            self.happened += self.kv.run(batch, self.members)


def test_a_step_that_was_overdue_is_tried_again_in_smaller_ones() -> None:
    """Else the next rank would be given up for it, and so on for ever."""
    ranks: Any = SlowRanks()
    mirror: Any = SimpleNamespace(state=lambda: ClusterState(revision=1, engine_token=TOKEN))
    settings = config(max_batched_tokens=40)
    engine = Engine(settings, TOKEN, Peers(mirror, ranks, ranks, ranks, ranks), clock=lambda: 0.0)
    engine._scheduler.set_view(view(1, ranks.members), (), 0.0)
    engine._scheduler.submit(ask("a", [1] * 44, 3, ignore_eos=True), 0.0)
    while len(ranks.tried) < 2:
        engine.turn()
    assert ranks.tried == [40, 20]
    assert len(ranks.members) == 1


def test_what_an_earlier_submission_gave_is_not_sent_after_the_next_one_was_taken() -> None:
    """Its first tokens went to a connection that is gone: what is left would be a gap."""
    ranks: Any = Ranks()
    mirror: Any = SimpleNamespace(state=lambda: ClusterState(revision=1, engine_token=TOKEN))
    engine = Engine(config(), TOKEN, Peers(mirror, ranks, ranks, ranks, ranks), clock=lambda: 0.0)
    engine._outbox = [Tokens(TOKEN, "a", 7, [1]), Tokens(TOKEN, "b", 3, [1])]
    again = [ask("a", [1] * 4, 9, taken=True)]
    ranks.take = lambda: again.copy() if again else []
    engine._take_requests()
    assert [each.request_id for each in engine._outbox] == ["b"]
    assert engine._scheduler.knows("a")
