"""Requests whose rank has died go on with what is left in its pool: what is read when, and what undoes it."""

from __future__ import annotations

import pytest

from chaos.simulation.kv_model import KvModel
from elastic.engine.salvage import AT_ONCE
from elastic.engine.scheduler import Scheduler
from membership.base.rank_id import RankId
from membership.base.timing import COPY_TIMEOUT_S, SALVAGE_WAIT_S
from membership.store.records import Member, View
from tests.support.rank_model import TOKEN, Client, ask, config, drive, pool_is_whole, view
from workers.protocol.messages import BlocksCopied, CopyBlocks, StepBatch

pytestmark = pytest.mark.unit

SIZE, PROMPT = 4, 17
DEAD = RankId(1, 11)


class Scene:
    """Ranks that all have requests of 17 tokens and a few more; rank 1 is about to die."""

    def __init__(self, requests: int = 2, ranks: int = 2, nodes: str = "nnn", **changes: object) -> None:
        limits: dict[str, object] = {"kv_blocks": 60, "max_seqs": 8, "max_batched_tokens": 200}
        self.scheduler = Scheduler(config(**(limits | changes)), TOKEN)
        self.members = dict(enumerate(range(10, 10 + ranks)))
        placed = tuple(Member(rank=r, node=nodes[r], incarnation=i) for r, i in self.members.items())
        whole = view(1, self.members)
        self.scheduler.set_view(View(epoch=1, members=placed, placement=whole.placement), [], 0.0)
        self.ranks, self.client = KvModel(SIZE), Client()
        for n in range(requests):
            self.client.submit(self.scheduler, ask(f"r{n}", [5 + n] * PROMPT, 25, ignore_eos=True), 0.0)
        for _ in range(4):
            self.step()

    def step(self, now: float = 0.0) -> StepBatch | None:
        batch = self.scheduler.schedule(now)
        for result in self.ranks.run(batch, self.members) if batch is not None else []:
            self.client.take(self.scheduler.apply(result, now))
        return batch

    def kill(self, *, ended: bool = True) -> StepBatch | None:
        """Rank 1 is lost between two steps; what runs next. Then the requests that it had have another home."""
        self.scheduler.lose_ranks([1], 0.0, ended=ended)
        return self.step()

    def read(self, piece: int = 100) -> list[CopyBlocks]:
        """Answer everything that is asked, with steps between; what was asked."""
        asked, orders = [], self.scheduler.copies(0.0)
        while orders:
            asked += orders
            orders = [more for o in orders for more in self.scheduler.copied(self.ranks.copy(o, piece), 0.0)]
            pool_is_whole(self.scheduler)
            self.step()
        return asked

    def computed(self, batch: StepBatch | None) -> dict[int, int]:
        """sequence -> tokens that this step computes of it."""
        chunks = [chunk for each in batch.ranks.values() for chunk in each] if batch is not None else []
        return {chunk.seq: len(chunk.tokens) for chunk in chunks}

    def finish(self) -> None:
        drive(self.scheduler, self.ranks, self.client, self.members)
        self.client.check()
        pool_is_whole(self.scheduler)
        assert self.scheduler.reading == ()


def test_what_a_dead_rank_had_computed_is_not_computed_again() -> None:
    scene = Scene(4)
    before = [(s.seq, s.computed) for s in scene.scheduler._homes[1].running]
    assert scene.kill() is not None
    assert scene.scheduler.reading == (DEAD,)
    asked = scene.read()
    assert [order.source for order in asked] == [DEAD] * 2
    done = scene.scheduler.salvaged()
    assert [(each.source, each.target, each.tokens) for each in done] == [(1, 0, computed) for _, computed in before]
    assert scene.scheduler.salvaged_tokens == sum(each.tokens for each in done)
    scene.finish()


@pytest.mark.parametrize("more", range(SIZE))
def test_only_the_token_under_way_is_computed_again(more: int) -> None:
    """Wherever in its last block it is, its next step is like any other."""
    scene = Scene(2)
    (kept,), (lost,) = (scene.scheduler._homes[rank].running for rank in (0, 1))
    for _ in range(more):
        scene.step()
    scene.scheduler.lose_ranks([1], 0.0, ended=True)
    (order,) = scene.scheduler.copies(0.0)
    scene.scheduler.copied(scene.ranks.copy(order), 0.0)
    assert scene.computed(scene.step()) == {kept.seq: 1, lost.seq: 1}
    scene.finish()


def test_a_request_that_lost_its_home_is_in_the_next_step() -> None:
    """That waits for as long as it will take: one rank does what two did for two seconds, and itself for one more."""
    scene = Scene(4)
    waiting = [sequence.seq for sequence in scene.scheduler._homes[1].running]
    batch = scene.scheduler.schedule(10.0)
    assert batch is not None
    scene.client.take(scene.scheduler.apply(scene.ranks.answer(batch, 1, 11), 11.0))
    assert scene.scheduler.copies_wait_s(12.0) == 0.0
    scene.scheduler.lose_ranks([1], 12.0, ended=True)
    scene.client.take(scene.scheduler.apply(scene.ranks.answer(batch, 0, 10), 13.0))
    orders = scene.scheduler.copies(13.0)
    assert len(orders) == 2
    while orders:
        assert scene.scheduler.copies_wait_s(13.0) == 5.0
        orders = [more for order in orders for more in scene.scheduler.copied(scene.ranks.copy(order, 1), 13.0)]
    assert scene.scheduler.copies_wait_s(13.0) == 0.0
    assert scene.computed(scene.step(13.0)).keys() >= set(waiting)
    scene.finish()


@pytest.mark.parametrize(("ranks", "longest_s"), [(2, 2.0), (3, 1.5), (5, 1.25)])
def test_a_step_waits_for_reads_as_long_as_missing_it_costs(ranks: int, longest_s: float) -> None:
    """That is the time of the next step, which has a rank less. The last one had all, as the death came at its end."""
    scene = Scene(2 * ranks, ranks, "n" * ranks)
    batch = scene.scheduler.schedule(10.0)
    assert batch is not None
    for result in scene.ranks.run(batch, scene.members):
        scene.client.take(scene.scheduler.apply(result, 11.0))
    scene.scheduler.lose_ranks([1], 11.0, ended=True)
    assert scene.scheduler.copies(11.0)
    assert scene.scheduler.copies_wait_s(11.0) == pytest.approx(longest_s)
    assert scene.scheduler.copies_wait_s(11.5) == pytest.approx(longest_s - 0.5)


def test_what_a_dead_rank_left_is_read_beside_the_step_under_way() -> None:
    """Piece after piece. A rank may answer once its step is over, however long that takes: the time that it has for it
    counts from then on."""
    scene = Scene(2)
    (lost,) = scene.scheduler._homes[1].running
    batch = scene.scheduler.schedule(0.0)
    assert batch is not None
    scene.scheduler.lose_ranks([1], 0.0, ended=True)
    (order,) = scene.scheduler.reads(0.0)
    (order,) = scene.scheduler.copied(scene.ranks.copy(order, 1), 0.0)
    late = 2 * COPY_TIMEOUT_S
    assert scene.scheduler.reads(late) == []
    scene.client.take(scene.scheduler.apply(scene.ranks.answer(batch, 0, 10), late))
    assert scene.scheduler.copies(late) == []
    scene.scheduler.copied(scene.ranks.copy(order), late)
    assert scene.scheduler.copies_wait_s(late) == 0.0
    assert scene.computed(scene.step(late))[lost.seq] == 1
    scene.finish()


def test_nothing_is_read_into_blocks_that_the_step_under_way_still_writes() -> None:
    """They are free again once their request was aborted, and may be the only ones."""
    scene = Scene(2, kv_blocks=11)
    (kept,), (lost,) = (scene.scheduler._homes[rank].running for rank in (0, 1))
    batch = scene.scheduler.schedule(0.0)
    assert batch is not None
    written = {block for chunk in batch.ranks[0] for block in chunk.blocks}
    scene.scheduler.abort(kept.request.request_id)
    scene.scheduler.lose_ranks([1], 0.0, ended=True)
    assert scene.scheduler.reads(0.0) == []
    scene.scheduler.apply(scene.ranks.answer(batch, 0, 10), 0.0)
    (order,) = scene.scheduler.copies(0.0)
    assert written.intersection(order.blocks)
    scene.scheduler.copied(scene.ranks.copy(order), 0.0)
    assert scene.computed(scene.step()) == {lost.seq: 1}


def test_such_blocks_of_one_rank_keep_no_other_from_reading() -> None:
    scene = Scene(9, ranks=3)
    aborted = scene.scheduler._homes[2].running[0]
    batch = scene.scheduler.schedule(0.0)
    assert batch is not None
    scene.scheduler.abort(aborted.request.request_id)
    scene.scheduler.lose_ranks([1], 0.0, ended=True)
    early = scene.scheduler.reads(0.0)
    assert {order.target.rank for order in early} == {0}
    for rank in (0, 2):
        scene.client.take(scene.scheduler.apply(scene.ranks.answer(batch, rank, 10 + rank), 0.0))
    late = scene.scheduler.copies(0.0)
    assert {order.target.rank for order in late} == {2}
    assert len(early + late) == 3


def test_a_request_waits_for_the_step_if_only_that_keeps_it_from_where_its_tokens_are() -> None:
    """Its host is full until then; on another, which has room, all of them would be computed again."""
    scene = Scene(0, ranks=3, nodes="nnm", max_seqs=2)
    for n, tokens in enumerate((25, 25, 25, 4)):
        request = ask(f"r{n}", [5 + n] * PROMPT, tokens, ignore_eos=True)
        scene.client.submit(scene.scheduler, request, 0.0)
    for _ in range(3):
        scene.step()
    (lost,) = scene.scheduler._homes[1].running
    assert [len(scene.scheduler._homes[rank].running) for rank in (0, 2)] == [2, 1]
    batch = scene.scheduler.schedule(0.0)
    assert batch is not None
    scene.scheduler.lose_ranks([1], 0.0, ended=True)
    assert scene.scheduler.reads(0.0) == []
    for rank in (0, 2):
        scene.client.take(scene.scheduler.apply(scene.ranks.answer(batch, rank, 10 + rank), 0.0))
    assert scene.client.ends == {"r3": "length"}
    (order,) = scene.scheduler.copies(0.0)
    scene.scheduler.copied(scene.ranks.copy(order), 0.0)
    assert (order.target.rank, lost.home) == (0, scene.scheduler._homes[0])
    assert lost.computed == len(lost.tokens) - 1
    scene.finish()


@pytest.mark.parametrize("again", [True, False], ids=["works then", "fails again"])
def test_what_could_not_be_read_beside_a_step_is_asked_for_once_more_after_it(*, again: bool) -> None:
    """An agent has much to do in the first moment after a death. All that were asked for may fail."""
    scene = Scene(4)
    lost = scene.scheduler._homes[1].running.copy()
    batch = scene.scheduler.schedule(0.0)
    assert batch is not None
    scene.scheduler.lose_ranks([1], 0.0, ended=True)
    for order in scene.scheduler.reads(0.0):
        assert scene.scheduler.copied(scene.ranks.copy(order, error="timeout"), 0.0) == []
    scene.client.take(scene.scheduler.apply(scene.ranks.answer(batch, 0, 10), 0.0))
    orders = scene.scheduler.copies(0.0)
    assert len(orders) == len(lost) == 2
    for order in orders:
        scene.scheduler.copied(scene.ranks.copy(order, error="" if again else "refused"), 0.0)
    assert (scene.scheduler.copies(0.0), scene.scheduler.reading) == ([], ())
    assert all(each.computed == (len(each.tokens) - 1 if again else 0) for each in lost)
    scene.finish()


def test_steps_go_on_between_reads_that_take_long() -> None:
    scene = Scene(2)
    scene.scheduler.lose_ranks([1], 0.0, ended=True)
    (order,) = scene.scheduler.copies(1.0)
    assert scene.scheduler.copies_wait_s(1.0) == pytest.approx(SALVAGE_WAIT_S)
    assert scene.scheduler.copies_wait_s(1.0 + 2 * SALVAGE_WAIT_S) < 0.0
    assert len(scene.computed(scene.step(2.0))) == 1
    (order,) = scene.scheduler.copied(scene.ranks.copy(order, 1), 2.0)
    assert scene.scheduler.copies_wait_s(2.0) == pytest.approx(SALVAGE_WAIT_S), "once more"
    scene.scheduler.abort(scene.scheduler._homes[0].running[1].request.request_id)
    assert scene.scheduler.copies(2.0) == []
    assert scene.scheduler.copies_wait_s(2.0) == 0.0


def test_the_others_go_on_while_blocks_are_read_piece_by_piece() -> None:
    scene = Scene(4)
    waiting = [sequence.seq for sequence in scene.scheduler._homes[1].running]
    others = [sequence.seq for sequence in scene.scheduler._homes[0].running]
    scene.kill()
    orders = scene.scheduler.copies(0.0)
    assert len(orders) == 2
    assert sorted(scene.computed(scene.step())) == others
    orders = [more for order in orders for more in scene.scheduler.copied(scene.ranks.copy(order, 1), 0.0)]
    assert sorted(scene.computed(scene.step())) == others
    while orders:
        orders = [more for order in orders for more in scene.scheduler.copied(scene.ranks.copy(order, 1), 0.0)]
    assert sorted(scene.computed(scene.step())) == sorted(others + waiting)
    scene.finish()


def test_a_rank_reads_a_few_pieces_between_two_steps() -> None:
    scene = Scene(14, max_seqs=14, kv_blocks=300)
    scene.kill()
    orders = scene.scheduler.copies(0.0)
    assert (len(orders), scene.scheduler.copies(0.0)) == (AT_ONCE, [])
    assert len(scene.scheduler.copied(scene.ranks.copy(orders[0]), 0.0)) == 1


def test_without_pools_nothing_is_read() -> None:
    scene = Scene(2, kv_pools=False)
    scene.kill()
    assert (scene.scheduler.copies(0.0), scene.scheduler.reading) == ([], ())
    scene.finish()


def test_a_token_is_not_read_before_its_step_was_answered() -> None:
    """The dead rank may have computed it or not, or half of it."""
    scene = Scene(2)
    (lost,) = scene.scheduler._homes[1].running
    while lost.computed % SIZE != SIZE - 1:
        scene.step()
    batch = scene.scheduler.schedule(0.0)
    assert batch is not None
    assert scene.computed(batch)[lost.seq] == 1, "the block will be full"
    confirmed = lost.computed
    scene.scheduler.lose_ranks([1], 0.0, ended=True)
    scene.client.take(scene.scheduler.apply(scene.ranks.answer(batch, 0, 10), 0.0))
    (order,) = scene.scheduler.copies(0.0)
    scene.scheduler.copied(scene.ranks.copy(order), 0.0)
    assert lost.computed == confirmed
    scene.finish()


def test_what_is_read_is_found_by_requests_that_begin_alike() -> None:
    scene = Scene(2)
    scene.kill()
    scene.read()
    known = scene.scheduler.cached_tokens
    scene.client.submit(scene.scheduler, ask("again", [6] * PROMPT, 3, ignore_eos=True), 0.0)
    scene.step()
    assert scene.scheduler.cached_tokens - known == 4 * SIZE
    scene.finish()


def test_a_rank_that_may_live_leaves_nothing() -> None:
    scene = Scene(2)
    scene.kill(ended=False)
    assert (scene.scheduler.copies(0.0), scene.scheduler.reading) == ([], ())
    scene.finish()


def test_nothing_is_read_on_another_host() -> None:
    scene = Scene(2, nodes="mn")
    scene.kill()
    assert (scene.scheduler.copies(0.0), scene.scheduler.reading) == ([], ())
    scene.finish()


def test_a_home_on_the_same_host_is_preferred() -> None:
    scene = Scene(3, ranks=3, nodes="mnn")
    scene.kill()
    assert [order.target.rank for order in scene.scheduler.copies(0.0)] == [2]


def test_a_prompt_that_is_scored_is_computed_whole() -> None:
    scene = Scene(0)
    for n in range(2):
        request = ask(f"s{n}", [5 + n] * 40, 5, ignore_eos=True, prompt_logprobs=1)
        scene.client.submit(scene.scheduler, request, 0.0)
    scene.scheduler._budget.tokens = lambda decodes, prompting, alone=False: 20  # type: ignore[method-assign]
    scene.step()
    scene.kill()
    assert (scene.scheduler.copies(0.0), scene.scheduler.reading) == ([], ())
    scene.finish()


def test_a_pool_that_cannot_be_read_is_asked_for_once() -> None:
    scene = Scene(4)
    scene.kill()
    order, other = scene.scheduler.copies(0.0)
    assert scene.scheduler.copied(scene.ranks.copy(order, error="refused"), 0.0) == []
    scene.scheduler.copied(scene.ranks.copy(other), 0.0)
    assert (scene.scheduler.copies(0.0), scene.scheduler.reading) == ([], ())
    scene.finish()


def test_a_rank_that_does_not_answer_computes_from_where_it_got_to() -> None:
    scene = Scene(2)
    (lost,) = scene.scheduler._homes[1].running
    scene.kill()
    (order,) = scene.scheduler.copies(0.0)
    scene.scheduler.copied(scene.ranks.copy(order, 2), 0.0)
    assert scene.scheduler.copies(COPY_TIMEOUT_S + 0.1) == []
    batch = scene.scheduler.schedule(COPY_TIMEOUT_S + 0.1)
    assert scene.computed(batch)[lost.seq] == len(lost.tokens) - 2 * SIZE


@pytest.mark.parametrize("copied", [0, 2], ids=["nothing yet", "a part"])
def test_the_new_home_dies_too_while_it_reads(copied: int) -> None:
    """What the first one left is more than what the second one has got."""
    scene = Scene(3, ranks=3)
    scene.kill()
    (order,) = scene.scheduler.copies(0.0)
    if copied:
        scene.scheduler.copied(scene.ranks.copy(order, copied), 0.0)
    scene.scheduler.lose_ranks([order.target.rank], 0.0, ended=True)
    scene.step()
    assert DEAD in scene.scheduler.reading
    again = [each for each in scene.read() if each.source == DEAD]
    assert [each.there for each in again] == [order.there]
    scene.finish()


def test_an_aborted_request_needs_no_pool() -> None:
    scene = Scene(2)
    (lost,) = scene.scheduler._homes[1].running
    scene.kill()
    assert scene.scheduler.reading == (DEAD,)
    (order,) = scene.scheduler.copies(0.0)
    scene.scheduler.abort(lost.request.request_id)
    assert scene.scheduler.reading == ()
    assert scene.scheduler.copied(scene.ranks.copy(order), 0.0) == []


def test_a_read_is_overdue_while_another_of_the_same_ranks_is_not_wanted_any_more() -> None:
    scene = Scene(4)
    _, unwanted = scene.scheduler._homes[1].running
    scene.kill()
    assert len(scene.scheduler.copies(0.0)) == 2
    scene.scheduler.abort(unwanted.request.request_id)
    assert scene.scheduler.copies(COPY_TIMEOUT_S) == []
    pool_is_whole(scene.scheduler)


@pytest.mark.parametrize("wrong", ["copy", "rank", "too many"])
def test_other_answers_count_for_nothing(wrong: str) -> None:
    scene = Scene(2)
    (lost,) = scene.scheduler._homes[1].running
    scene.kill()
    (order,) = scene.scheduler.copies(0.0)
    good = scene.ranks.copy(order)
    bad = {
        "copy": BlocksCopied(0, 10, TOKEN, good.copy - 1, good.blocks),
        "rank": BlocksCopied(0, 9, TOKEN, good.copy, good.blocks),
        "too many": BlocksCopied(0, 10, TOKEN, good.copy, good.blocks + 1),
    }[wrong]
    scene.scheduler.copied(bad, 0.0)
    assert lost.computed == 0


def test_a_rank_that_leaves_moves_what_it_has_read() -> None:
    scene = Scene(3, ranks=3)
    scene.kill()
    (order,) = scene.scheduler.copies(0.0)
    scene.scheduler.leave([order.target.rank])
    orders = scene.scheduler.copies(0.0) + scene.scheduler.copied(scene.ranks.copy(order), 0.0)
    while orders or scene.scheduler.waited_for:
        orders = [more for each in orders for more in scene.scheduler.copied(scene.ranks.copy(each), 0.0)]
        scene.step()
        orders += scene.scheduler.copies(0.0)
    assert order.target.rank in {moved.source for moved in scene.scheduler.moved()}
    scene.finish()
