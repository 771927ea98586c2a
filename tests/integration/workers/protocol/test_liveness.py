"""Every watcher is notified of a death, by the mutex first, however the process ends; and only of a death."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.support.helpers import eventually, hang
from workers.ipc import futex
from workers.protocol import liveness
from workers.protocol.liveness import DeathWatcher, LivenessPage

pytestmark = pytest.mark.integration

RANK = """
import sys
from workers.protocol.liveness import LivenessPage
page = LivenessPage.create()
sys.stdout.write(page.handle().hex() + "\\n"); sys.stdout.flush()
for line in sys.stdin:
    if line == "work\\n": page.progress()
    if line == "let go\\n": page.close(); sys.stdout.write("gone\\n"); sys.stdout.flush()
    if line == "end\\n": break
"""


class Rank:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout is not None
        self.handle = bytes.fromhex(self.process.stdout.readline())

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


def test_what_is_called_off_is_seen_by_the_rank_and_never_taken_back() -> None:
    with LivenessPage.create() as page, LivenessPage.attach(page.handle()) as seen_by_engine:
        for below in (70, 50):
            seen_by_engine.call_off(below)
            word = ctypes.c_uint64.from_address(page.called_off_at)
            assert (page.called_off, word.value) == (70, 70)
            del word
        page.progress()
        assert (seen_by_engine.steps, seen_by_engine.called_off) == (1, 70)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "end"])
def test_every_watcher_learns_of_it_by_the_mutex(how: str) -> None:
    with Rank() as rank, LivenessPage.attach(rank.handle) as first, LivenessPage.attach(rank.handle) as second:
        reported: queue.Queue[str] = queue.Queue()
        watchers = [DeathWatcher(page, reported.put) for page in (first, second)]
        if how == "end":
            rank.say("end")
        else:
            os.kill(rank.process.pid, getattr(signal, how))
        assert [reported.get(timeout=30.0) for _ in watchers] == ["robust futex"] * 2
        for watcher in watchers:
            watcher.stop()
        assert reported.empty()


def test_a_watcher_that_comes_late_is_notified_too() -> None:
    with Rank() as rank, LivenessPage.attach(rank.handle) as page:
        rank.process.kill()
        rank.process.wait(timeout=30)
        reported: queue.Queue[str] = queue.Queue()
        watcher = DeathWatcher(page, reported.put)
        assert reported.get(timeout=30.0)
        watcher.stop()


def test_a_death_is_certain_while_another_watcher_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """That watcher has the mutex, and waits for its interpreter lock before it lets go."""
    monkeypatch.setattr(liveness, "PASSED_ON_S", 30.0)
    with Rank() as rank, LivenessPage.attach(rank.handle) as page:
        got, looked_at = threading.Event(), threading.Event()

        def watch() -> None:
            code = futex._mutex_clocklock(page.mutex.address, time.CLOCK_MONOTONIC, futex.Timespec.of(2**31))
            assert code == errno.EOWNERDEAD
            got.set()
            looked_at.wait(timeout=30.0)
            page.mutex.unlock()

        watcher = threading.Thread(target=watch)
        watcher.start()
        rank.process.kill()
        assert got.wait(timeout=30.0)
        known = page.mutex.owner_died

        def look(timeout_s: float) -> bool | None:
            looked_at.set()
            return known(timeout_s)

        monkeypatch.setattr(page.mutex, "owner_died", look)
        assert page.ended
        watcher.join(timeout=30.0)


def test_a_rank_that_let_the_mutex_go_is_watched_by_pidfd() -> None:
    with Rank() as rank, LivenessPage.attach(rank.handle) as page:
        reported: queue.Queue[str] = queue.Queue()
        watcher = DeathWatcher(page, reported.put)
        rank.say("let go")
        assert rank.process.stdout is not None
        assert rank.process.stdout.readline() == "gone\n"
        rank.process.kill()
        assert reported.get(timeout=30.0) == "pidfd"
        watcher.stop()


def test_heartbeats_stop_with_the_process_and_steps_count_work() -> None:
    with Rank() as rank, LivenessPage.attach(rank.handle) as page:
        assert page.steps == 0
        rank.say("work")
        eventually(lambda: page.steps == 1, 30.0, "a step")
        before = page.heartbeats
        eventually(lambda: page.heartbeats > before, 30.0, "a heartbeat")
        hang(rank.process.pid)
        stopped_at = page.heartbeats
        reported: queue.Queue[str] = queue.Queue()
        watcher = DeathWatcher(page, reported.put)
        assert page.heartbeats == stopped_at
        os.kill(rank.process.pid, signal.SIGCONT)
        eventually(lambda: page.heartbeats > stopped_at, 30.0, "the heartbeat to go on")
        watcher.stop()
        assert reported.empty(), "a stopped process is not a dead one"
