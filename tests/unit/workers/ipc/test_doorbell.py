"""When a doorbell spins before it sleeps, by a clock of the test."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from workers.ipc import doorbell
from workers.ipc.doorbell import FAR_SPIN, SPIN_IF_WITHIN, SPIN_US, VAIN, Doorbell

pytestmark = pytest.mark.unit
LATE_US, SOON_US = 10 * SPIN_US, SPIN_US // 4


class Silent:
    """A source."""

    def __init__(self, connection: socket.socket) -> None:
        self.fileno = connection.fileno

    def pump(self) -> None:
        raise AssertionError("nothing was sent")


class Clock:
    """It goes on by a microsecond per turn of a spin, and by what a sleep takes."""

    def __init__(self) -> None:
        self.now_us, self.due_us, self.spins = 1_000_000, 0, 0

    def now_ns(self) -> int:
        return self.now_us * 1000

    def turn(self) -> None:
        self.now_us += 1
        self.spins += 1

    def sleep(self, *_: object) -> bool:
        self.now_us = max(self.now_us, self.due_us)
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(doorbell, "_now_ns", made.now_ns)
    monkeypatch.setattr(doorbell, "_sched_yield", made.turn)
    monkeypatch.setattr(Doorbell, "_sleep", made.sleep)
    return made


@pytest.fixture
def bell() -> Iterator[Doorbell]:
    with Doorbell() as made:
        yield made


@pytest.fixture
def far(bell: Doorbell) -> Iterator[Doorbell]:
    """It has a socket, too, over which nothing comes."""
    near, other = socket.socketpair()
    with near, other:
        bell.watch(Silent(near))
        yield bell


def spins(bell: Doorbell, clock: Clock, after_us: int) -> int:
    """Turns of a spin during a wait that ends by a ring after so long; it follows the last one at once."""
    clock.due_us, clock.spins = clock.now_us + after_us, 0
    assert bell.wait(lambda: clock.now_us >= clock.due_us, 30.0)
    return clock.spins


def test_it_spins_for_what_comes_soon(bell: Doorbell, clock: Clock) -> None:
    spins(bell, clock, SOON_US)  # the first wait is a rare one
    assert [spins(bell, clock, SOON_US) for _ in range(3 * VAIN)] == [SOON_US] * (3 * VAIN)


def test_beside_sockets_it_spins_for_longer(far: Doorbell, clock: Clock) -> None:
    """Both ends of a connection that sleep for a moment only are too late for each other's next spin, else."""
    spins(far, clock, SOON_US)
    assert spins(far, clock, FAR_SPIN * SPIN_US - 1) == FAR_SPIN * SPIN_US - 1


def test_beside_sockets_it_does_not_spin_for_what_always_takes_longer(far: Doorbell, clock: Clock) -> None:
    found = [spins(far, clock, LATE_US) for _ in range(3 * VAIN)]
    assert found[1:VAIN] == [FAR_SPIN * SPIN_US] * (VAIN - 1)
    assert found[VAIN:] == [0] * (2 * VAIN)


def test_beside_sockets_a_wait_was_too_long_if_the_spin_and_waking_up_are_shorter(far: Doorbell, clock: Clock) -> None:
    """Rows of one round wait about 240 us: at that limit a thread went on spinning for many of them."""
    for _ in range(2 * VAIN):
        spins(far, clock, (FAR_SPIN + 1) * SPIN_US + 1)
    assert spins(far, clock, SOON_US) == 0
    for _ in range(2 * VAIN):
        spins(far, clock, (FAR_SPIN + 1) * SPIN_US)
    assert spins(far, clock, SOON_US) == SOON_US


def test_one_wait_that_was_shorter_has_it_spin_again(far: Doorbell, clock: Clock) -> None:
    for _ in range(2 * VAIN):
        spins(far, clock, LATE_US)
    assert spins(far, clock, SOON_US) == 0, "it slept, which was short"
    assert spins(far, clock, SOON_US) == SOON_US


def test_without_sockets_it_goes_on_spinning(bell: Doorbell, clock: Clock) -> None:
    """A queue's readers have two stable states else: who sleeps is slow to answer, which has the others wait longer."""
    found = [spins(bell, clock, LATE_US) for _ in range(3 * VAIN)]
    assert found[1:] == [SPIN_US] * (3 * VAIN - 1)


def test_it_does_not_spin_for_a_rare_wait(bell: Doorbell, clock: Clock) -> None:
    spins(bell, clock, SOON_US)
    clock.now_us += SPIN_IF_WITHIN * SPIN_US
    assert spins(bell, clock, SOON_US) == 0
