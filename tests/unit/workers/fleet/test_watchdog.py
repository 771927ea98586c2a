"""The progress watchdog's decision: a rank that does nothing is evicted, one that works, starves or waits is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from membership.base.rank_id import RankId
from membership.base.timing import HUNG_S, LATE_MAX_S, LATE_S, PACE_WINDOW_S, STOPPED_S
from workers.fleet.pace import Pace, slow_ranks
from workers.fleet.watchdog import TICK_S, Look, Watchdog

pytestmark = pytest.mark.unit

A, B = RankId(0, 1), RankId(1, 2)
WAITING = Look(state="S", heartbeats=5, steps=3, turns=7)
Course = Callable[[int], Look]


def seen(course: Course, looks: int = 200, late_by_s: float = 0.0) -> tuple[str, float]:
    """The sign by which a rank with this course is evicted, and after how long; "" if it never is."""
    dog = Watchdog()
    dog.began(1, [A], 0.0)
    now = dog.due
    for number in range(looks):
        for key, sign in dog.watch({A: course(number)}, now):
            assert key == A
            return sign, now
        now = dog.due + late_by_s
    return "", now


def test_a_stopped_rank_is_evicted_soon_but_not_for_a_blink() -> None:
    sign, at = seen(lambda n: replace(WAITING, state="T"))
    assert sign == "stopped"
    assert STOPPED_S < at <= LATE_MAX_S + STOPPED_S + 3 * TICK_S
    assert seen(lambda n: replace(WAITING, state="T" if n % 5 else "S", turns=7 + n // 5))[0] == ""


def test_a_native_hang_is_evicted_with_the_interpreters_lock_and_without() -> None:
    sign, at = seen(lambda n: WAITING)  # no heartbeat any more
    assert (sign, at >= HUNG_S) == ("hung", True)
    beating, others_run = (lambda n: replace(WAITING, heartbeats=n, all_s=n * 0.03)), True
    assert seen(beating)[0] == "hung"
    assert seen(lambda n: replace(beating(n), others_run=others_run))[0] == "hung"


@pytest.mark.parametrize(
    "course",
    [
        lambda n: replace(WAITING, turns=7 + n // 10),  # waits for a peer: it wakes twice per second
        lambda n: replace(WAITING, main_s=n * 0.01),  # slow, but at work
        lambda n: replace(WAITING, state="R"),  # gets no processor
        lambda n: replace(WAITING, state="D"),  # waits for a disk
        lambda n: replace(WAITING, steps=n),
        lambda n: replace(WAITING, others_run=True),  # another thread has the interpreter, and gets no processor
        lambda n: replace(WAITING, all_s=n * 0.04),  # another thread has the interpreter, and works
        lambda n: replace(WAITING, turns=0),  # a worker that does not count them
        lambda n: replace(WAITING, state="T", main_s=n // 3 * 0.01),  # runs between stops, though never when looked at
        lambda n: replace(WAITING, state="T", turns=7 + n // 3),
    ],
)
def test_a_rank_that_works_starves_or_waits_is_not_evicted(course: Course) -> None:
    assert seen(course)[0] == ""


def test_the_watchdogs_own_lateness_evicts_no_rank() -> None:
    calls = 0

    def course(number: int) -> Look:
        nonlocal calls
        calls += 1
        return WAITING

    sign, at = seen(course, late_by_s=5.0)
    assert sign == "hung"
    assert calls >= HUNG_S / (2 * TICK_S), "one late look must not count for all the time before it"
    assert at > 30.0


def test_steps_that_usually_take_longer_are_late_later() -> None:
    dog = Watchdog()
    now = 0.0
    for step in range(50):
        dog.began(step, [A, B], now)
        dog.answered(A, step, now + 0.1)
        dog.answered(B, step, now := now + 0.1)
        assert dog.due == math.inf
    dog.began(50, [A, B], now)
    assert dog.due == pytest.approx(now + LATE_S)
    stopped = {A: WAITING, B: replace(WAITING, state="T")}
    assert dog.watch(stopped, dog.due) == []
    assert dog.due == pytest.approx(now + 0.3)


def test_answers_to_other_steps_and_lost_ranks() -> None:
    dog = Watchdog()
    dog.began(2, [A, B], 0.0)
    dog.answered(A, 1, 0.1)
    assert dog.waits_for(A)
    dog.answered(A, 2, 0.1)
    dog.gone(B)
    assert dog.due == math.inf
    dog.began(3, [], 1.0)
    assert dog.due == math.inf


def test_a_rank_ten_times_slower_than_the_others_is_flagged() -> None:
    chunks = {0: 100, 1: 100, 2: 100, 3: 5}
    even = {0: 0.9, 1: 1.1, 2: 1.0, 3: 1.9}
    assert slow_ranks(even, chunks, ()) == {}
    slow = {**even, 1: 10.0}
    assert slow_ranks(slow, chunks, ()) == {1: pytest.approx(10.0 / 0.95, rel=0.2)}
    half = {**even, 1: 2.5}
    assert slow_ranks(half, chunks, ()) == {}
    assert slow_ranks(half, chunks, {1}).keys() == {1}
    assert slow_ranks({0: 0.01, 1: 0.1}, {0: 100, 1: 100}, ()) == {}, "a rank that hardly works is not compared"


def test_a_slow_rank_is_flagged_after_two_windows_until_it_is_as_fast_again() -> None:
    pace = Pace(0.0)
    waited = {0: 0.0, 1: 0.0, 2: 0.0}

    def window(number: int, slow: int) -> set[int]:
        pace.worked({rank: [1] * 50 for rank in waited})
        for rank in waited:
            waited[rank] += 0.0 if rank == slow else 0.9 * PACE_WINDOW_S
        pace.compare(dict(waited), PACE_WINDOW_S * (number + 1))
        return set(pace.slow)

    assert [window(number, 1) for number in range(4)] == [set(), set(), {1}, {1}], "the first window only begins"
    pace.gone(1)
    assert set(pace.slow) == set()
    assert [window(number, 2) for number in range(4, 7)] == [set(), {2}, {2}]
    assert window(7, -1) == set()
