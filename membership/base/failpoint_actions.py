"""What a failpoint (`failpoints.py`) can do to the process that passes it, beyond an exception: die, hang, be late.

Whoever hangs does so in native code, as a driver or a library would: asleep in the kernel, with the interpreter's lock
or without. What wakes it is the kernel too, when the file changes in which the fault is armed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.01
WATCH_MS = 200  # between looks, where the kernel cannot tell of a change
_CHANGED = 0x2 | 0x4 | 0x400  # IN_MODIFY | IN_ATTRIB | IN_DELETE_SELF: written to, or replaced by another file
_POLLIN = 1


class _Poll(ctypes.Structure):
    """The kernel's struct pollfd."""

    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


def kill() -> None:
    """SIGKILL ourselves."""
    os.kill(os.getpid(), signal.SIGKILL)


def segv() -> None:
    """Read where nothing is."""
    ctypes.string_at(0)


def hang(armed: Callable[[], bool], source: Path | None, *, with_lock: bool) -> None:
    """Sleep in native code while `armed()`, which is asked whenever `source` changes; without a source for ever."""
    libc = ctypes.PyDLL(None) if with_lock else ctypes.CDLL(None)  # PyDLL keeps the interpreter's lock
    while armed():
        with _watched(source) as fd:
            wanted = _Poll(fd, _POLLIN, 0)
            if armed():  # once more: it may have changed before it was watched
                libc.poll(ctypes.byref(wanted), 1, -1 if fd >= 0 or source is None else WATCH_MS)


@contextmanager
def _watched(source: Path | None) -> Iterator[int]:
    """A descriptor that becomes readable when the file changes; -1 if there is none to be had."""
    libc = ctypes.CDLL(None)
    fd = -1 if source is None else int(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    try:
        if fd >= 0 and libc.inotify_add_watch(fd, os.fsencode(str(source)), _CHANGED) < 0:
            yield -1
        else:
            yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def pause(going_on: Callable[[], bool], limit_s: float) -> bool:
    """Wait while `going_on()`, at most so long; whether it ended by itself."""
    sleep, deadline = threading.Event(), time.monotonic() + limit_s
    while going_on():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        sleep.wait(min(POLL_S, left))
    return True
