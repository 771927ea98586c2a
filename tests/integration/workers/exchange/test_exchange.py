"""The exchange between real processes: the same bits for any number of ranks, and through the loss of any of them."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import forkserver
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from membership.base.errors import CoverageLost, PeerTimeout
from membership.base.rank_id import RankId
from membership.store.records import Member, View
from tests.support.exchange_ranks import Experts, RankGroup, batch, broken, spread
from tests.support.helpers import eventually
from workers.exchange.batch import ExpertFailed
from workers.exchange.combine import ascending
from workers.exchange.loop import Exchange
from workers.exchange.model_side import StepContext
from workers.exchange.rows import Rows, bits
from workers.exchange.transports import opener
from workers.ipc.doorbell import Doorbell

pytestmark = pytest.mark.integration

Work = tuple[int, int, int, int, int, int, str]  # layer, seed, tokens, top_k, experts, hidden, dtype
LAYERS, EXPERTS, HIDDEN = 2, 8, 96


@pytest.fixture(scope="module", autouse=True)
def context() -> Iterator[Any]:
    """Processes are forked from one that has torch loaded and no threads."""
    os.environ["OMP_NUM_THREADS"] = "1"
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(["tests.support.exchange_ranks"])
    forkserver.ensure_running()
    yield found
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def oracle(work: Work) -> Tensor:
    """The same sum in one process, pair by pair."""
    layer, seed, tokens, top_k, experts, hidden, dtype = work
    rows, ids, weights = batch(seed, tokens, top_k, experts, hidden, getattr(torch, dtype))
    bank = Experts(0, {0: (tuple(range(experts)),) * (layer + 1)})
    ids, weights = ascending(ids, weights)
    out = torch.empty_like(rows)
    for t in range(tokens):
        total = torch.zeros(hidden)
        for k in range(top_k):
            part = bank.compute(layer, int(ids[t, k]), rows[t : t + 1])[0].float() * weights[t, k]
            total = part if k == 0 else total + part
        out[t] = total.to(rows.dtype)
    return out


def same_bits(got: Rows, want: Tensor) -> bool:
    return np.array_equal(got, bits(want))


def works(rank: int, dtype: str, layers: int = LAYERS) -> list[Work]:
    """Each rank has its own number of rows, and some have none."""
    tokens = (5, 1, 0, 33, 2, 7)[rank % 6]
    return [(layer, 100 * rank + layer, tokens, 3, EXPERTS, HIDDEN, dtype) for layer in range(layers)]


def run_all(group: RankGroup, dtype: str = "bfloat16", masked: int = 0) -> dict[int, tuple[int, set[int]]]:
    """One step of all ranks at once, compared with the oracle; retried rows and suspects of each."""
    ctx = group.context_of(masked)
    for rank, process in group.ranks.items():
        process.send("steps", ctx, works(rank, dtype))
    seen = {}
    for rank, process in group.ranks.items():
        outs, retried, suspects = process.result()
        for out, work in zip(outs, works(rank, dtype), strict=True):
            assert same_bits(out, oracle(work)), (rank, work)
        seen[rank] = (retried, suspects)
    return seen


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("ranks", "copies"), [(1, 1), (2, 1), (4, 2), (6, 3)])
def test_same_bits_whatever_the_ranks(context: Any, ranks: int, copies: int, dtype: str) -> None:
    with RankGroup(context, spread(range(ranks), LAYERS, EXPERTS, copies)) as group:
        for _ in range(3):
            assert set(run_all(group, dtype).values()) == {(0, frozenset())}


def test_large_parcels_go_in_parts(context: Any) -> None:
    small = 64 * 1024  # 341 rows of 96 bf16
    work = (0, 5, 400, 4, EXPERTS, HIDDEN, "bfloat16")
    with RankGroup(context, {0: ((),), 1: (tuple(range(EXPERTS)),)}, area=small) as group:
        outs, _, _ = group.ranks[0].call("steps", group.context_of(), [work])
        assert same_bits(outs[0], oracle(work))


def test_a_peer_is_answered_wherever_it_and_we_are(context: Any) -> None:
    """Rank 0 runs ten steps alone while 1 is idle and 2 is in a layer of its own: no rank waits for another's step."""
    with RankGroup(context, spread(range(3), LAYERS, EXPERTS, 1)) as group:
        for step in range(10):
            ctx = group.context_of()
            group.ranks[0].send("steps", ctx, works(0, "float32"))
            group.ranks[2].send("steps", group.context_of(), works(3, "float32")[step % 2 :])
            outs, _, _ = group.ranks[0].result()
            assert all(same_bits(o, oracle(w)) for o, w in zip(outs, works(0, "float32"), strict=True))
            group.ranks[2].result()


def stop_inside_a_dispatch(group: RankGroup, lost: int, ranks: list[int]) -> None:
    """`ranks` begin a step; rank `lost` stops in its first expert of layer 1, that is, while it has others' rows."""
    group.ranks[lost].call("stop_before", 1)
    ctx = group.context_of()
    for rank in ranks:
        group.ranks[rank].send("steps", ctx, works(rank, "bfloat16"))
    process = psutil.Process(group.ranks[lost].pid)
    eventually(lambda: process.status() == psutil.STATUS_STOPPED, 30, f"rank {lost} stops with rows of others")


def check_results(group: RankGroup, ranks: list[int]) -> tuple[int, set[int]]:
    """Everything equals the oracle; retried rows and suspects over all ranks."""
    retried, suspects = 0, set()
    for rank in ranks:
        outs, rows, suspected = group.ranks[rank].result()
        assert all(same_bits(o, oracle(w)) for o, w in zip(outs, works(rank, "bfloat16"), strict=True))
        retried += rows
        suspects |= suspected
    return retried, suspects


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_a_peer_killed_inside_a_dispatch_is_replaced(context: Any, lost: int) -> None:
    with RankGroup(context, spread(range(4), LAYERS, EXPERTS, 2)) as group:
        others = [r for r in range(4) if r != lost]
        stop_inside_a_dispatch(group, lost, others)
        group.ranks[lost].kill()
        retried, suspects = check_results(group, others)
        assert retried > 0
        assert suspects == {lost}
        group.ranks.pop(lost).close()
        assert all(r == 0 for r, _ in run_all(group, masked=1 << lost).values())


def test_a_second_peer_killed_while_the_firsts_rows_are_sent_again(context: Any) -> None:
    """Both hold rows of others; the second dies right after the first, whose rows may have gone to it."""
    with RankGroup(context, spread(range(6), LAYERS, EXPERTS, 3)) as group:
        lost, others = (1, 2), [0, 3, 4, 5]
        group.ranks[lost[1]].call("stop_before", 1)
        stop_inside_a_dispatch(group, lost[0], others)
        second = psutil.Process(group.ranks[lost[1]].pid)
        eventually(lambda: second.status() == psutil.STATUS_STOPPED, 30, "the second stops with rows of others")
        for rank in lost:
            group.ranks[rank].kill()
        retried, suspects = check_results(group, others)
        assert retried > 0
        assert suspects == set(lost)


def test_a_stopped_peer_is_masked_and_its_waking_changes_nothing(context: Any) -> None:
    with RankGroup(context, spread(range(4), LAYERS, EXPERTS, 2)) as group:
        stop_inside_a_dispatch(group, 1, [0, 2, 3])
        group.lose(1)
        retried, suspects = check_results(group, [0, 2, 3])
        assert retried > 0
        assert suspects == {1}
        zombie = group.ranks.pop(1)
        os.kill(zombie.pid, signal.SIGCONT)
        zombie.call("calls")  # it has answered what it was asked before it stopped, and goes on
        try:
            for _ in range(5):
                zombie.send("steps", group.context_of(), works(0, "bfloat16"))
                run_all(group)
                zombie.result()
            group.all("disconnect", [zombie.me])
            run_all(group)
        finally:
            zombie.close()


def test_a_stopped_peer_that_is_not_masked_is_named(context: Any) -> None:
    with RankGroup(context, spread(range(2), LAYERS, EXPERTS, 1), answer_timeout_s=3.0) as group:
        stop_inside_a_dispatch(group, 1, [0])
        with pytest.raises(PeerTimeout, match=r"layer 1: no answer from ranks \[1\]"):
            group.ranks[0].result()
        os.kill(group.ranks[1].pid, signal.SIGCONT)
        for _ in range(3):  # its late answer is to a request that is no longer open
            run_all(group)


def has_stopped(processes: dict[int, psutil.Process]) -> int | None:
    return next((r for r, p in processes.items() if p.status() == psutil.STATUS_STOPPED), None)


def test_no_answer_without_a_live_holder(context: Any) -> None:
    """Both holders die: CoverageLost, and what a rank can answer alone it still answers."""
    layout = {0: ((0,),), 1: ((1, 2),), 2: ((1, 2),)}
    work = [(0, 3, 4, 3, 3, HIDDEN, "float32")]
    with RankGroup(context, layout) as group:
        group.ranks[1].call("stop_before", 0)
        group.ranks[2].call("stop_before", 0)
        group.ranks[0].send("steps", group.context_of(), work)
        holders = {r: psutil.Process(group.ranks[r].pid) for r in (1, 2)}
        while holders:  # the second has the rows at the latest when the first is gone
            stopped = eventually(lambda: has_stopped(holders), 30, "a holder has the rows")
            del holders[stopped]
            group.ranks[stopped].kill()
        with pytest.raises(CoverageLost, match=r"layer 0: no live rank holds experts \[1, 2\]"):
            group.ranks[0].result()
        outs, _, _ = group.ranks[0].call("steps", group.context_of(), [(0, 3, 4, 1, 1, HIDDEN, "float32")])
        assert same_bits(outs[0], oracle((0, 3, 4, 1, 1, HIDDEN, "float32")))


def test_a_rank_that_lacks_or_breaks_an_expert_is_passed_over(context: Any) -> None:
    layout = {0: ((),), 1: ((0, 1, 2),), 2: ((0, 1, 2),)}
    work = (0, 3, 6, 3, 3, HIDDEN, "float32")
    with RankGroup(context, layout) as group:
        group.ranks[1].call("unload", 0, 1)
        group.ranks[2].call("fail_at", 2)
        outs, retried, suspects = group.ranks[0].call("steps", group.context_of(), [work])
        assert same_bits(outs[0], oracle(work))
        assert (retried > 0, suspects) == (True, frozenset())
        group.ranks[2].call("unload", 0, 1)
        with pytest.raises(CoverageLost, match=r"\[1\]"):
            group.ranks[0].call("steps", group.context_of(), [work])


def test_what_a_rank_fails_to_compute_for_itself_goes_to_a_replica(context: Any) -> None:
    """Meanwhile its peers get what it can compute, and a refusal for the rest."""
    every = (tuple(range(EXPERTS)),) * LAYERS
    with RankGroup(context, {0: every, 1: every, 2: ((), ()), 3: ((), ())}) as group:
        group.ranks[0].call("fail_at", 1)
        for _ in range(5):
            assert not any(suspects for _, suspects in run_all(group).values())
        group.ranks[1].call("unload", 0, 1)
        work = [(0, 3, 6, 3, 3, HIDDEN, "float32")]
        with pytest.raises(CoverageLost, match=r"\[1\]"):
            group.ranks[0].call("steps", group.context_of(), work)


def test_an_expert_that_fails_and_has_no_replica_is_named() -> None:
    placement = {0: ((0, 1, 2),)}
    bank = Experts(0, placement)
    bank.before, whys = broken(1), list[BaseException]()
    with closing(Doorbell()) as bell, closing(Exchange(RankId(0, 1), bank, bell, opener("shm"))) as exchange:
        exchange.failed = whys.append
        members = (Member(rank=0, node="n", incarnation=1),)
        assert not exchange.stays(), "outside of a step"
        exchange.begin_step(StepContext(View(epoch=1, members=members, placement=placement), 7, 1, 1))
        assert exchange.stays()
        with pytest.raises(ExpertFailed, match=r"layer 0, expert 1: .*broken here") as raised:
            exchange.dispatch_combine(0, *batch(1, 6, 3, 3, HIDDEN, torch.float32))
        assert raised.value.__cause__ is whys[0], "the step's end is judged by it"
        assert ["broken here" in str(why) for why in whys] == [True], "of the device, maybe: who has it asks it"
        bank.before = broken(None)
        work = (0, 1, 6, 3, 3, HIDDEN, "float32")
        got = exchange.dispatch_combine(0, *batch(1, 6, 3, 3, HIDDEN, torch.float32))
        assert same_bits(bits(got), oracle(work))


def test_a_rank_whose_own_expert_fails_still_answers_its_peers(context: Any) -> None:
    """Rank 1 fails at expert 1 in a step of its own, which it begins when rank 0 has asked for expert 0."""
    with RankGroup(context, {0: ((),), 1: ((0, 1),)}, answer_timeout_s=20.0) as group:
        group.ranks[1].call("fail_at", 1)
        ctx, work = group.context_of(), (0, 3, 6, 1, 1, HIDDEN, "float32")
        group.ranks[1].send("step_once_asked", ctx, [(0, 4, 6, 2, 2, HIDDEN, "float32")])
        group.ranks[0].send("steps", ctx, [work])
        outs, retried, _ = group.ranks[0].result()
        assert (same_bits(outs[0], oracle(work)), retried) == (True, 0)
        with pytest.raises(RuntimeError, match=r"layer 0, expert 1: .*broken here"):
            group.ranks[1].result()


def test_each_expert_runs_once_for_all_that_wait(context: Any) -> None:
    layout = {0: ((),), 1: ((),), 2: ((),), 3: ((0, 1, 2),)}
    with RankGroup(context, layout) as group:
        group.ranks[3].call("answer_once_asked_by", 3)
        ctx = group.context_of()
        work = [(0, r, 4, 3, 3, HIDDEN, "bfloat16") for r in range(3)]
        for rank in range(3):
            group.ranks[rank].send("steps", ctx, [work[rank]])
        for rank in range(3):
            assert same_bits(group.ranks[rank].result()[0][0], oracle(work[rank]))
        assert sorted(group.ranks[3].call("calls")) == [(0, 0, 12), (0, 1, 12), (0, 2, 12)]


def no_more(now: dict[int, tuple[int, int]], before: dict[int, tuple[int, int]]) -> bool:
    """Fewer are no leak: an accepted connection may have been closing when `before` was taken."""
    return all(ours <= theirs for rank in now for ours, theirs in zip(now[rank], before[rank], strict=True))


def test_a_rank_joins_while_the_others_exchange(context: Any) -> None:
    with RankGroup(context, spread(range(2), LAYERS, EXPERTS, 1)) as group:
        run_all(group)  # what a first step opens is open, and the links are whole
        before = group.all("resources")
        for rank in (0, 1):
            group.ranks[rank].send("loop", group.context_of(), works(rank, "bfloat16"), 300)
        later = spread(range(3), LAYERS, EXPERTS, 2)
        process = group.spawn(2, later)
        process.call("connect", group.handles())  # the others are in the middle of their steps, and are not asked
        assert all(r > 0 for r in (group.ranks[0].result(), group.ranks[1].result()))
        group.link()
        group.all("load", later)
        group.placement = later
        run_all(group)
        group.ranks.pop(2).close()
        group.all("disconnect", [process.me])
        group.placement = spread(range(2), LAYERS, EXPERTS, 1)
        run_all(group)
        eventually(lambda: no_more(group.all("resources"), before), 30, "the links to be let go")


def test_a_newer_incarnation_takes_the_slot(context: Any) -> None:
    with RankGroup(context, spread(range(3), LAYERS, EXPERTS, 2)) as group:
        for _ in range(3):
            group.ranks.pop(1).close()
            group.spawn(1)
            group.link()
            run_all(group)
