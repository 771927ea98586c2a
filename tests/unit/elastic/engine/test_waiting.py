"""Who is refused for want of room, with which answer; who never is."""

from __future__ import annotations

import pytest

from chaos.simulation.kv_model import KvModel
from elastic.engine.scheduler import Scheduler
from elastic.engine.sequence import Sequence
from elastic.engine.waiting import WaitingRoom
from elastic.protocol import Rejected
from tests.support.rank_model import TOKEN, Client, ask, config, drive, view

pytestmark = pytest.mark.unit


def full(**limits: object) -> tuple[Scheduler, Client]:
    """One rank of four places, all taken, and two requests that wait."""
    scheduler, client = Scheduler(config(max_seqs=4, **limits), TOKEN), Client()
    scheduler.set_view(view(1, {0: 10}), [], 0.0)
    for n in range(6):
        client.submit(scheduler, ask(f"r{n}", [5 + n], 6, ignore_eos=True), 0.0)
    return scheduler, client


def refused(scheduler: Scheduler, now: float, **more: object) -> Rejected | None:
    (answer,) = scheduler.submit(ask("one more", [7, 8, 9], 6, **more), now) or (None,)
    assert answer is None or isinstance(answer, Rejected)
    return answer


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"max_waiting_requests": 2}, {"requests": 1}),
        ({"max_waiting_tokens": 4}, {"tokens": 1}),
        ({"max_waiting_requests": 3, "max_waiting_tokens": 5}, {}),
    ],
)
def test_so_many_may_wait_and_no_more(limits: dict[str, object], why: dict[str, int]) -> None:
    scheduler, client = full(**limits)
    answer = refused(scheduler, 1.0)
    assert scheduler.shed == why
    assert (answer is not None) == bool(why)
    if answer is not None:
        assert answer.status == 429
        assert answer.retry_after_s > 0
        assert "2 requests of 2 tokens wait" in answer.message
        assert not scheduler.knows("one more")
        drive(scheduler, KvModel(4), client, {0: 10})
        client.check()


def test_who_finds_a_place_at_once_does_not_wait() -> None:
    scheduler, client = Scheduler(config(max_seqs=4, max_waiting_requests=1), TOKEN), Client()
    scheduler.set_view(view(1, {0: 10}), [], 0.0)
    for n in range(5):
        client.submit(scheduler, ask(f"r{n}", [5 + n], 6), 0.0)
    assert not client.ends
    client.submit(scheduler, ask("r5", [4], 6), 0.0)
    assert client.ends["r5"].startswith("429")


@pytest.mark.parametrize("known", [{"taken": True}, {"emitted": [4]}])
def test_what_an_engine_has_taken_before_is_taken_by_the_next(known: dict[str, object]) -> None:
    scheduler, _ = full(max_waiting_requests=2, max_wait_s=3.0)
    assert refused(scheduler, 1.0, **known) is None
    scheduler.expire(60.0)
    assert scheduler.knows("one more")


def test_a_request_waits_for_a_place_only_so_long() -> None:
    scheduler, client = full(max_wait_s=20.0)
    scheduler.schedule(0.0)
    assert scheduler.expire(19.9) == []
    client.take(scheduler.expire(20.0))
    assert sorted(client.ends) == ["r4", "r5"]
    assert "wait for a place for 20 s" in client.ends["r4"]
    assert scheduler.shed == {"wait": 2}


def test_a_request_that_loses_its_rank_is_never_refused() -> None:
    scheduler, client = full(max_wait_s=20.0, max_waiting_requests=2)
    scheduler.schedule(0.0)
    scheduler.set_view(view(2, {1: 11}), [], 1.0)
    scheduler.lose_ranks([1], 1.0)
    scheduler.set_view(view(3, {2: 12}), [], 25.0)
    assert scheduler.expire(25.0) == [], "there were no places to wait for until now"
    client.take(scheduler.expire(45.0))
    assert sorted(client.ends) == ["r4", "r5"]


def test_where_nothing_can_run_the_refusal_is_a_503() -> None:
    scheduler, _ = full(max_waiting_requests=2)
    scheduler.lose_ranks([0], 1.0)
    answer = refused(scheduler, 1.0)
    assert answer is not None
    assert answer.status == 503


def test_retry_after_follows_the_rate_at_which_places_became_free() -> None:
    scheduler, client = full(max_waiting_requests=2)
    found = refused(scheduler, 0.0)
    assert found is not None
    assert found.retry_after_s == pytest.approx(1.0), "four places within no time"
    found = refused(scheduler, 40.0)
    assert found is not None
    assert found.retry_after_s == pytest.approx(20.0), "four places in 40 s, two wait"
    found = refused(scheduler, 1000.0)
    assert found is not None
    assert found.retry_after_s == pytest.approx(60.0)
    assert not client.ends


def test_the_rate_is_that_since_the_first_place_remembered() -> None:
    room = WaitingRoom(config())
    requests = [Sequence.of(ask(f"r{n}", [5]), n, 0.0) for n in range(6)]
    for request in requests:
        room.turns.begin("")
        room.add(request)
    for request, now in zip(requests, (0.0, 10.0, 20.0, 30.0), strict=False):
        room.place(request, 0, now)
    assert room.retry_after_s(40.0) == pytest.approx(20.0), "four places in 40 s, two wait"
