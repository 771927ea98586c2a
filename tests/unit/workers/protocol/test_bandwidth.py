"""The bucket of a host's reading: its pace over any while, what idle time is worth, and a bound on each wait."""

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


def test_a_brake_lets_go_at_its_deadline() -> None:
    now, waited, booked = [100.0], list[float](), list[float]()

    def wait(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    def book() -> float:
        booked.append(now[0])
        return 4.0

    brake = Brake(book, wait, until=110.0, clock=lambda: now[0])
    for _ in range(5):
        brake()
    assert waited == [4.0, 4.0, 2.0]
    assert booked == [100.0, 104.0, 108.0], "nothing is booked that is not kept to"
