"""Threads that share the calls of a step: results in order, errors after the last call has ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from workers.model.attention_plan import plan_step
from workers.model.cpu.attention import CpuAttention, parts
from workers.model.cpu.compute_threads import LEAST, ComputeThreads
from workers.model.cpu.kv_cache import CpuKVCache
from workers.protocol.messages import SeqChunk

pytestmark = pytest.mark.unit
DEADLINE_S = 60.0


@pytest.fixture
def threads() -> Iterator[ComputeThreads]:
    with closing(ComputeThreads()) as made:
        yield made


def test_calls_run_beside_each_other_and_their_results_are_in_order(threads: ComputeThreads) -> None:
    threads.count = 3
    all_three = threading.Barrier(3)

    def call(number: int) -> tuple[int, bool, int]:
        all_three.wait(DEADLINE_S)  # fails unless three threads are here at once
        return number, torch.is_inference_mode_enabled(), torch.get_num_threads()

    torch.set_num_threads(1)
    with torch.inference_mode():
        assert threads.map(call, range(6), LEAST) == [(number, True, 1) for number in range(6)]


@pytest.mark.parametrize(("count", "work"), [(1, LEAST), (4, LEAST - 1)])
def test_one_core_or_small_calls_need_no_helper(threads: ComputeThreads, count: int, work: int) -> None:
    threads.count = count
    assert set(threads.map(lambda _: threading.get_ident(), range(5), work)) == {threading.get_ident()}


def test_where_no_thread_is_to_be_had_the_caller_does_all(
    threads: ComputeThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads.count = 3

    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    assert threads.map(abs, [-1, -2, -3], LEAST) == [1, 2, 3]
    monkeypatch.undo()
    assert threads.map(abs, [-1, -2, -3], LEAST) == [1, 2, 3], "and what was left of it disturbs nothing"


@pytest.mark.parametrize("by_helper", [False, True])
def test_an_error_is_raised_once_no_call_is_under_way(threads: ComputeThreads, *, by_helper: bool) -> None:
    threads.count, running = 2, set[int]()
    both = threading.Barrier(2)

    def call(number: int) -> None:
        running.add(number)
        both.wait(DEADLINE_S)
        if by_helper != (threading.current_thread() is threading.main_thread()):
            raise ValueError(number)
        running.discard(number)

    with pytest.raises(ValueError, match=r"[01]"):
        threads.map(call, range(2), LEAST)
    assert len(running) == 1  # the one that failed
    assert threads.map(abs, [-1, -2, -3], LEAST) == [1, 2, 3]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("tiles", "heads", "numbers"), [(3, 5, 1000), (3, 5, 30_000), (2, 16, 131_072), (1, 1, 10**7)])
def test_parts_are_whole_tiles_or_heads_of_one(tiles: int, heads: int, numbers: int, threads: int) -> None:
    found = parts(tiles, heads, numbers, threads)
    assert [entry for part in found for entry in part] == list(range(tiles * heads))
    for part in found:
        assert len(part) * numbers <= 128 * 1024 or len(part) == 1
        assert len(part) % heads == 0 or part.start // heads == (part.stop - 1) // heads


def test_a_decode_step_is_cut_for_all_threads() -> None:
    """Four streams with 512 cells of context would fit in one part: a quarter of the step, in one thread."""
    rows, cells, width = 4, 512, 64
    assert parts(4, 16, rows * cells, 2) == [range(32), range(32, 64)]
    assert parts(1, 16, rows * cells, 2) == [range(8), range(8, 16)]
    assert len(parts(4, 16, rows * cells)) == 1
    threads = ComputeThreads()
    threads.count = 2
    assert threads.sharing(64 * rows * cells * 2 * width) == 2
    assert threads.sharing(2 * LEAST - 1) == 1


def test_attention_of_a_decode_step_is_computed_by_all_threads(
    threads: ComputeThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, both = list[int](), threading.Barrier(2)

    def attend(queries: torch.Tensor, *_: object) -> torch.Tensor:
        both.wait(DEADLINE_S)  # fails unless two threads are here at once
        calls.append(len(queries))
        return queries

    monkeypatch.setattr("workers.model.cpu.attention._probs", attend)
    monkeypatch.setattr("workers.model.cpu.attention.mix", lambda probs, _: probs)
    cache = CpuKVCache(1, 160, 16, torch.float32)
    attention, chunks = (
        CpuAttention(cache, threads),
        [SeqChunk(s, 500, [1], [*range(32 * s, 32 * s + 32)]) for s in range(4)],
    )
    attention.plan, attention.min_rows, threads.count = plan_step(chunks, 16, 4, torch.device("cpu")), 4, 2
    torch.set_num_threads(1)
    with torch.inference_mode():
        attention.forward(0, *(torch.zeros(1, 16, 4, 64) for _ in range(3)), 1.0, None)
    assert calls == [32, 32]
