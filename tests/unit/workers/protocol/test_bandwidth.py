"""The bucket of a host's reading: its pace over any while, what idle time is worth, waits that are progress."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.protocol.bandwidth import Brake, Bucket

pytestmark = pytest.mark.unit

RATE, BURST_S = 1000.0, 0.1


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 3000)), min_size=1, max_size=30))
def test_no_more_is_read_than_the_pace_and_a_burst_allow(asked: list[tuple[float, int]]) -> None:
    bucket, now, read = Bucket(RATE, BURST_S), 5.0, list[tuple[float, int]]()
    for pause_s, amount in asked:
        now += pause_s
        read.append((now + bucket.book(amount, now), amount))
    assert [at for at, _ in read] == sorted(at for at, _ in read), "in the order of asking"
    for number, (since, _) in enumerate(read):
        for until, _ in read[number:]:
            begun = sum(amount for at, amount in read[number:] if at < until)
            assert begun <= RATE * (until - since + BURST_S) + 1e-6


def test_who_asks_after_a_while_does_not_wait() -> None:
    bucket = Bucket(RATE, BURST_S)
    assert bucket.book(500, 10.0) == 0.0
    assert bucket.book(500, 10.0) == pytest.approx(0.4), "a tenth of a second was saved"
    assert bucket.book(500, 11.0) == 0.0
    assert bucket.book(500, 11.4) == pytest.approx(0.0)
    assert bucket.book(1, 11.5) == pytest.approx(0.4)


def test_a_brake_waits_in_pieces_each_of_which_is_progress() -> None:
    waited, marks = list[float](), list[int]()
    brake = Brake(lambda: 25.0, lambda s: bool(waited.append(s)), mark_s=10.0, mark=lambda: marks.append(len(waited)))
    brake()
    assert waited == [10.0, 10.0, 5.0], "a cap is a cap, however long it takes"
    assert marks == [1, 2, 3]


def test_a_brake_that_is_broken_off_waits_no_more() -> None:
    waited = list[float]()
    Brake(lambda: 25.0, lambda s: waited.append(s) or True, mark_s=10.0, mark=lambda: None)()
    assert waited == [10.0]
