"""What a failpoint (`failpoints.py`) can do to its process, beyond raising: die, hang, be delayed.

A hang is in native code, as in a driver or a library: asleep in the kernel, with or without the interpreter's lock. It
is woken by the kernel when the file changes in which the fault is armed.
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
WATCH_MS = 200  # poll interval where the kernel cannot notify us of a change
_CHANGED = 0x2 | 0x4 | 0x400  # IN_MODIFY | IN_ATTRIB | IN_DELETE_SELF: written to, or replaced by another file
_POLLIN = 1


class _Poll(ctypes.Structure):
    """The kernel's struct pollfd."""

    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


def kill() -> None:
    """Send SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def segv() -> None:
    """Read an invalid address."""
    ctypes.string_at(0)


def hang(armed: Callable[[], bool], source: Path | None, *, with_lock: bool) -> None:
    """Sleep in native code while `armed()`, checked whenever `source` changes; without a source, for ever."""
    libc = ctypes.PyDLL(None) if with_lock else ctypes.CDLL(None)  # PyDLL keeps the interpreter's lock
    while armed():
        with _watched(source) as fd:
            wanted = _Poll(fd, _POLLIN, 0)
            if armed():  # again: it may have changed before the watch began
                libc.poll(ctypes.byref(wanted), 1, -1 if fd >= 0 or source is None else WATCH_MS)


@contextmanager
def _watched(source: Path | None) -> Iterator[int]:
    """A descriptor that becomes readable when the file changes; -1 if the kernel gives none."""
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
    """Wait while `going_on()`, at most `limit_s`; return whether it ended before that."""
    sleep, deadline = threading.Event(), time.monotonic() + limit_s
    while going_on():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        sleep.wait(min(POLL_S, left))
    return True
