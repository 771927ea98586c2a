"""What tests share: waiting for something to become true, with a deadline that says what was waited for."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil

from membership.base.process_stats import is_dying, is_stopped

T = TypeVar("T")


def let_all_in(path: Path) -> None:
    """Have every user of this machine reach a socket of ours, as if its directory were open by mistake."""
    path.chmod(0o777)
    for folder in path.parents:
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(0o711)


def hang(pid: int) -> None:
    """It does nothing from now on: SIGSTOP, and each of its threads is stopped."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: is_stopped(pid) or is_dying(pid), 60.0, f"process {pid} to be stopped")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """It does nothing during the block, and goes on afterwards if it is still there."""
    hang(pid)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def eventually(predicate: Callable[[], T], timeout_s: float, what: str, interval_s: float = 0.01) -> T:
    """Return the first truthy value of `predicate`; AssertionError naming `what` after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what} (last value: {value!r})")
        time.sleep(interval_s)


def running(process: psutil.Process) -> bool:
    """Whether it has not ended. A zombie has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Calls:
    """The number of calls of Python and built-in functions."""

    count = 0


@contextmanager
def calls_in() -> Iterator[Calls]:
    """Count the calls that this thread makes in the block: what a computation costs, on any machine."""
    calls = Calls()

    def seen(_frame: object, event: str, _argument: object) -> None:
        calls.count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        yield calls
    finally:
        sys.setprofile(before)
