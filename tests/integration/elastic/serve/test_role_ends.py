"""A role that does only part of its work is worse than none: it ends when its loop stands still or a thread fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

HUNG = """
import ctypes
from membership.base import loop_watchdog
loop_watchdog.require(1.5)
with loop_watchdog.watched():
    for _ in range(40):
        loop_watchdog.heartbeat()
        ctypes.CDLL(None).usleep(50_000)  # for longer than the limit, all in all
    print("beating", flush=True)
    ctypes.{library}(None).usleep(60_000_000)
"""
LEFT = """
import time
from membership.base import loop_watchdog
loop_watchdog.require(1.0)
with loop_watchdog.watched():
    loop_watchdog.heartbeat()
time.sleep(2.5)
"""
FAILED = """
import sys, threading
from elastic.serve.role_main import end_with_any_thread
end_with_any_thread()
def fail():
    if sys.argv[1]:
        raise ValueError(sys.argv[1])
threading.Thread(target=fail).start()
threading.Event().wait(timeout=float(sys.argv[2]))
"""

STOPS = """
import signal
from elastic.serve.role_main import StopSignal
with StopSignal() as stop:
    for _ in range(2):  # a shell tells of it after the kernel has
        signal.raise_signal(signal.SIGHUP)
    print("stops" if stop.is_set() else "goes on")
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("library", ["CDLL", "PyDLL"])  # without the interpreter's lock, and with it
def test_a_loop_that_stands_still_ends_the_process_and_says_where(library: str) -> None:
    ended = run(HUNG.format(library=library))
    assert (ended.returncode, ended.stdout) == (1, "beating\n")
    assert "line 10" in ended.stderr


def test_who_has_left_its_loop_may_take_its_time() -> None:
    assert run(LEFT).returncode == 0


def test_a_thread_that_fails_ends_the_process() -> None:
    ended = run(FAILED, "by accident", "20")
    assert ended.returncode == 1
    assert "by accident" in ended.stdout + ended.stderr
    assert run(FAILED, "", "0").returncode == 0


def test_a_closed_terminal_stops_a_role_in_order_unless_that_is_ignored() -> None:
    assert run(STOPS).stdout == "stops\n"
    assert run("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + STOPS).stdout == "goes on\n"
