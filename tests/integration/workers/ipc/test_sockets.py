"""A doorbell that reads sockets as well: rings and arrivals wake its thread, even if it slept before."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.helpers import eventually
from workers.ipc.doorbell import Bell, Doorbell

pytestmark = pytest.mark.integration
WAIT_S = 30.0


class Bytes:
    """Collects what its end of a pair of sockets gets."""

    def __init__(self) -> None:
        self.far, self.near = socket.socketpair()
        self.near.setblocking(False)
        self.found = b""

    def fileno(self) -> int:
        return self.near.fileno()

    def pump(self) -> None:
        self.found += self.near.recv(100)

    def close(self) -> None:
        self.far.close()
        self.near.close()


@pytest.fixture
def bell() -> Iterator[Doorbell]:
    with Doorbell() as made:
        yield made


@pytest.fixture
def source() -> Iterator[Bytes]:
    made = Bytes()
    yield made
    made.close()


@contextmanager
def once_asleep(bell: Doorbell, action: Callable[[], object]) -> Iterator[None]:
    """`action` is done by another thread, once the one that waits within this sleeps."""
    sleeper = threading.get_native_id()

    def act() -> None:
        eventually(lambda: bell._waiting and status(sleeper).startswith("S"), WAIT_S, "the sleep", interval_s=0.001)
        action()

    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act)
        yield
        acting.result(WAIT_S)


def status(thread: int) -> str:
    """R while it runs, S while it sleeps."""
    return Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(") ")[2]


def test_what_arrives_wakes_the_thread_that_reads_it(bell: Doorbell, source: Bytes) -> None:
    bell.watch(source)
    with once_asleep(bell, lambda: source.far.send(b"hello")):
        assert bell.wait(lambda: source.found == b"hello", WAIT_S)


def test_a_ring_from_elsewhere_wakes_it_too(bell: Doorbell, source: Bytes) -> None:
    bell.watch(source)
    rung: list[int] = []
    other = Bell.attach(bell.fileno())

    def ring(number: int) -> None:
        rung.append(number)
        other.ring()

    for number in range(20):
        with once_asleep(bell, partial(ring, number)):
            assert bell.wait(lambda wanted=number: wanted in rung, WAIT_S)
    other.close()


def test_a_thread_that_sleeps_already_reads_a_socket_that_is_watched_later(bell: Doorbell, source: Bytes) -> None:
    def late() -> None:
        bell.watch(source)
        source.far.send(b"hello")

    with once_asleep(bell, late):
        assert bell.wait(lambda: source.found == b"hello", WAIT_S)


def test_without_a_thread_for_the_relay_rings_and_arrivals_are_seen_all_the_same(
    bell: Doorbell, source: Bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bell.watch(source)

    def none_left(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    rung: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        source.far.send(b"hello")
        assert bell.wait(lambda: source.found == b"hello", WAIT_S)
        bell.ring()
        bell.wait(lambda: rung, 0.001)
    thread = threading.Thread(target=lambda: (rung.append(1), bell.ring()))
    thread.start()
    assert bell.wait(lambda: rung, WAIT_S)
    thread.join(WAIT_S)


def test_no_ring_is_lost_between_many_of_them(bell: Doorbell, source: Bytes) -> None:
    bell.watch(source)
    asked, answered = [0], threading.Semaphore(0)

    def ringing() -> None:
        for _ in range(2000):
            asked[0] += 1
            bell.ring()
            assert answered.acquire(timeout=WAIT_S)

    thread = threading.Thread(target=ringing)
    thread.start()
    for number in range(1, 2001):
        assert bell.wait(lambda wanted=number: asked[0] >= wanted, WAIT_S)
        answered.release()
    thread.join(WAIT_S)


def test_what_is_not_watched_any_more_is_not_read(bell: Doorbell, source: Bytes) -> None:
    bell.watch(source)
    source.far.send(b"one")
    bell.look()
    bell.unwatch(source)
    bell.unwatch(source)
    source.far.send(b"two")
    bell.look()
    assert not bell.wait(lambda: source.found != b"one", 0.05)


FORGOTTEN = """
import gc, socket, threading
from workers.ipc import futex, sockets
from workers.ipc.doorbell import Doorbell
from tests.integration.workers.ipc.test_sockets import Bytes

slept, wait = threading.Semaphore(0), futex.sem_wait_until
def sleep(address, deadline_ns):
    wait(address, deadline_ns)  # it looks at that memory when the time is over
    slept.release()

futex.sem_wait_until, sockets.SLICE_NS = sleep, 20_000_000
bell, source = Doorbell(), Bytes()
bell.watch(source)
bell.wait(lambda: False, 0.001)  # from now on there is a relay
del bell
gc.collect()
for _ in range(3):
    assert slept.acquire(timeout=30.0)
"""


def test_a_doorbell_that_nobody_has_any_more_leaves_its_relay_the_memory_in_which_it_sleeps() -> None:
    process = subprocess.run([sys.executable, "-c", FORGOTTEN], timeout=WAIT_S, check=False, capture_output=True)
    assert process.returncode == 0, process
