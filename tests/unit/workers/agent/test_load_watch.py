"""When a load is given up: only if nothing advances, as the agent itself has seen."""

from __future__ import annotations

import pytest

from membership.base.errors import ElasticError
from membership.base.rank_id import RankId
from membership.store.records import ClusterConfig
from workers.agent.load_watch import LoadWatch
from workers.protocol.load_progress import LoadProgress, LoadSeen

pytestmark = pytest.mark.unit

CONFIG = ClusterConfig(
    cluster="c", model="/m", served_model_name="m", moe_layers=1, experts=2, launch_deadline_s=100, load_stall_s=10
)
A = RankId(0, 1)


class Call:
    def fail(self, error: ElasticError) -> None:
        raise AssertionError("the agent decides what follows")


def watch() -> tuple[LoadWatch, Call]:
    made, call = LoadWatch(CONFIG), Call()
    made.begin(A, call, 0.0)
    return made, call


def page(done: int, marks: int, *, loading: bool = True) -> LoadSeen:
    return LoadSeen(loading=loading, done=done, total=100, marks=marks)


def test_a_load_may_take_for_ever_if_it_advances() -> None:
    loads, _ = watch()
    for second in range(10_000):
        assert loads.look(A, page(0, second // 9), float(second)) is None
    assert loads.seen == {A: page(0, 1111)}


def test_a_load_without_progress_is_given_up_with_what_it_had() -> None:
    loads, call = watch()
    looks = [loads.look(A, page(30, 7), float(second)) for second in range(12)]
    assert looks[:10] == [None] * 10
    assert looks[10] == (call, "its load stalled at 30 of 100 bytes: no progress for 10.0 s")


def test_an_agent_that_was_held_up_gives_no_load_up() -> None:
    loads, _ = watch()
    assert loads.look(A, page(30, 7), 1.0) is None
    assert loads.look(A, page(30, 7), 1000.0) is None, "one look after a long pause proves nothing"


def test_what_is_no_load_may_take_a_launch() -> None:
    loads, _ = watch()
    looks = [loads.look(A, page(0, 7, loading=False), float(second)) for second in range(107)]
    assert looks[:105] == [None] * 105
    found = looks[105]
    assert found is not None
    assert found[1] == "it did not get to load: no progress for 105.0 s"
    assert loads.seen == {}


def test_a_call_that_has_ended_is_not_watched() -> None:
    loads, call = watch()
    later = Call()
    loads.begin(A, later, 5.0)
    loads.end(A, call)
    assert loads.look(A, page(0, 1), 6.0) is None
    assert A in loads.seen, "the later call goes on"
    loads.end(A, later)
    assert loads.seen == {}


def test_the_page_shows_the_load_under_way() -> None:
    words = memoryview(bytearray(32)).cast("Q")
    progress = LoadProgress(words)
    with progress.loading():
        progress.expect(50)
        progress.add(20)
        with progress.loading():  # a newer one begins before it ends
            progress.expect(50)
        assert tuple(words)[:3] == (1, 20, 100)
        before = words[3]
        progress.mark()
        assert words[3] == before + 1
    assert not words[0]
    with progress.loading():
        assert tuple(words)[:3] == (1, 0, 0)
