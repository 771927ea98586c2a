"""The few libc calls that memory shared between processes needs: semaphores and robust mutexes.

Python has no atomics and no memory fences. `sem_post` and `sem_trywait` are both (a locked instruction each) and enter
the kernel only when a thread sleeps, so doorbells use them. Calls that cannot block keep the GIL (`PyDLL`: 0.1 us);
calls that can block drop it (`CDLL`).
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import time
from typing import Any

from membership.base.errors import ConfigError

FAST = ctypes.PyDLL(None, use_errno=True)  # keeps the GIL
SLOW = ctypes.CDLL(None, use_errno=True)  # drops the GIL

SEM_BYTES = 32  # sizeof(sem_t) on every 64-bit glibc and musl
MUTEX_BYTES = 64  # at least sizeof(pthread_mutex_t) everywhere (40 on x86-64, 48 on aarch64)
_PROCESS_SHARED = 1
_MUTEX_ROBUST = 1


class Timespec(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    @classmethod
    def of(cls, seconds: float) -> Timespec:
        """From float seconds; never negative."""
        fraction, whole = math.modf(max(seconds, 0.0))
        return cls(int(whole), int(fraction * 1e9))


def _bind(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    try:
        function = getattr(library, name)
    except AttributeError as error:
        raise ConfigError(f"libc has no {name}", hint="Linux with glibc >= 2.30 is needed") from error
    function.argtypes = arguments
    function.restype = ctypes.c_int
    return function


_P, _I, _T = ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Timespec)
sem_post = _bind(FAST, "sem_post", _P)
"""Ring: never blocks; overflow (2^31 rings) is harmless, since the waiter will wake anyway."""
sem_trywait = _bind(FAST, "sem_trywait", _P)
_sem_init = _bind(FAST, "sem_init", _P, _I, ctypes.c_uint)
_sem_clockwait = _bind(SLOW, "sem_clockwait", _P, _I, _T)
_mutex_trylock = _bind(FAST, "pthread_mutex_trylock", _P)
_mutex_unlock = _bind(FAST, "pthread_mutex_unlock", _P)
_mutex_consistent = _bind(FAST, "pthread_mutex_consistent", _P)
_mutex_clocklock = _bind(SLOW, "pthread_mutex_clocklock", _P, _I, _T)


def sem_init(address: int, value: int = 0) -> None:
    """Make the memory at `address` a process-shared semaphore."""
    if _sem_init(address, _PROCESS_SHARED, value):
        raise OSError(ctypes.get_errno(), "sem_init")


def sem_drain(address: int) -> None:
    """Bring the value to 0 with a full fence; for the single waiter only.

    A ring that the initialisation overwrites is not lost: what it announced was written before it, and the caller
    looks at its sources after this fence. A ring after it stays. (A loop of `sem_trywait` would take 0.1 s after a
    million rings.)
    """
    _sem_init(address, _PROCESS_SHARED, 1)
    sem_trywait(address)


def sem_wait_until(address: int, deadline_ns: int) -> bool:
    """Sleep until rung, or until CLOCK_MONOTONIC is there. False also when a signal came: the caller loops, so that
    Python's handlers can run."""
    seconds, nanoseconds = divmod(deadline_ns, 1_000_000_000)
    return bool(_sem_clockwait(address, time.CLOCK_MONOTONIC, Timespec(seconds, nanoseconds)) == 0)


class RobustMutex:
    """A process-shared robust mutex: when the thread that holds it dies, the kernel hands it over and says so.

    That happens at the very start of the process's exit, before its memory is torn down: a fraction of a millisecond
    after SIGKILL whatever its size.
    """

    def __init__(self, address: int) -> None:
        self.address = address

    def initialise(self) -> None:
        """Set up the memory; once, by the process that will hold the mutex."""
        attributes = (ctypes.c_char * 64)()
        for name, values in (
            ("pthread_mutexattr_init", ()),
            ("pthread_mutexattr_setpshared", (_PROCESS_SHARED,)),
            ("pthread_mutexattr_setrobust", (_MUTEX_ROBUST,)),
        ):
            _check(name, getattr(FAST, name)(ctypes.byref(attributes), *values))
        _check("pthread_mutex_init", FAST.pthread_mutex_init(_P(self.address), ctypes.byref(attributes)))

    def lock_now(self) -> None:
        """Take the free mutex for the calling thread, whose death it will report."""
        _check("pthread_mutex_trylock", _mutex_trylock(self.address))

    def unlock(self) -> None:
        """Release it; only by the thread that holds it."""
        _check("pthread_mutex_unlock", _mutex_unlock(self.address))

    def owner_died(self, timeout_s: float) -> bool | None:
        """Wait for the holder's death: True if it died, False at the deadline, None if the mutex is free.

        The kernel hands the mutex to one watcher only. That one unlocks it *without* making it consistent, which gives
        ENOTRECOVERABLE to every other watcher, now or later.
        """
        until = Timespec.of(time.monotonic() + timeout_s)
        code = _mutex_clocklock(self.address, time.CLOCK_MONOTONIC, ctypes.byref(until))
        if code == errno.EOWNERDEAD:
            self.unlock()
            return True
        if code == errno.ENOTRECOVERABLE:
            return True
        if code == errno.ETIMEDOUT:
            return False
        _check("pthread_mutex_clocklock", code)
        self.unlock()
        return None


def _check(what: str, code: int) -> None:
    if code:
        raise OSError(code, f"{what}: {os.strerror(code)}")
