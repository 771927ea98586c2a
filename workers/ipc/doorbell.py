"""A doorbell: the one word on which a thread waits for all its sources, in memory that others can map and ring.

The thread checks its sources, goes on checking for at most 40 us (three times that for sockets), then sleeps on a
semaphore. A source writes first and rings afterwards; the semaphore is atomic, so no ring is lost between the last
check and the sleep. Ringing a thread that is awake costs 0.1 us and no system call. Sockets that it is to read as well
are in `sockets.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from membership.base.errors import QueueError
from workers.ipc import futex
from workers.ipc.shared_memory import PAGE, Segment
from workers.ipc.sockets import Sockets, Source

SPIN_US = 40
"""Not longer: ranks outnumber cores in tests and under CPU limits, and a spinning one delays the others' answers."""
SPIN_IF_WITHIN = 25
"""Spin only if the last wait began at most this number of spins (1 ms) ago: a rare wait would spin for nothing."""
FAR_SPIN, VAIN = 3, 8
"""A thread that reads sockets spins so many times as long: to be woken for what another host sends costs a processor
half of that, and if both sides sleep, each comes too late for the other's spin. But after VAIN waits in a row for
which it was too short it does not, until it would have been long enough.
"""
SLICE_NS = 500_000_000
"""Longest single sleep, so that signal handlers of Python run soon even if the signal came just before the sleep."""
_sched_yield = os.sched_yield
_now_ns = time.monotonic_ns


class Bell:
    """The ringing side: maps a doorbell that another process waits on."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self.address = segment.address  # for `futex.sem_post` in hot loops

    @classmethod
    def attach(cls, fd: int) -> Bell:
        """Map a doorbell by its descriptor (which stays the caller's)."""
        return cls(Segment.attach(fd, futex.SEM_BYTES))

    def ring(self) -> None:
        """Wake the waiter if it sleeps; whatever it should find must be written already."""
        futex.sem_post(self.address)

    def close(self) -> None:
        """Unmap; ringing afterwards is a bug of the owner."""
        self._segment.close()


class Doorbell(Bell):
    """The waiting side: made by the process that waits. One thread at a time may wait; any thread may ring."""

    def __init__(self, spin_us: float = SPIN_US) -> None:
        super().__init__(Segment.create(PAGE, "elastic-ep-doorbell"))
        futex.sem_init(self.address)
        self.on_slept: Callable[[int], None] | None = None  # gets the nanoseconds of each sleep
        self._waiting = False
        self._spin_ns = int(spin_us * 1000)
        self._began_ns = 0
        self._long = 0  # waits in a row that were too long to spin for
        self._opening = threading.Lock()
        self._sockets: Sockets | None = None

    def watch(self, source: Source) -> None:
        """Have the thread that waits read this, too. From any thread."""
        with self._opening:
            if self._sockets is None:
                self._sockets = Sockets(self._segment)
            self._sockets.add(source)
        self.ring()  # it may sleep where only rings wake it

    def unwatch(self, source: Source) -> None:
        """The opposite, before it is closed; again, too. From any thread."""
        if self._sockets is not None:
            self._sockets.discard(source)

    def look(self) -> None:
        """Read what sockets have, by the thread that waits; `wait` does so only if it finds nothing else."""
        if self._sockets is not None:
            self._sockets.look()

    def close(self) -> None:
        """Stop what reads sockets; no process may ring any more."""
        if self._sockets is not None:
            self._sockets.close()
        super().close()

    def fileno(self) -> int:
        """Descriptor to hand to the processes that will ring."""
        return self._segment.fileno()

    def wait(self, ready: Callable[[], object], timeout_s: float) -> bool:
        """Wait until `ready()` is true (True) or the deadline has passed (False). `ready` must be cheap."""
        return True if ready() else self.wait_for_ring(ready, timeout_s)

    def wait_for_ring(self, ready: Callable[[], object], timeout_s: float) -> bool:
        """As `wait`, by a caller who has just found that there is nothing."""
        if self._waiting:
            raise QueueError("two threads wait on one doorbell", hint="give each waiting thread its own Doorbell")
        self._waiting = True
        now = _now_ns()
        deadline = now + int(timeout_s * 1e9)
        far = self._sockets is not None
        often = now - self._began_ns < SPIN_IF_WITHIN * self._spin_ns and not (far and self._long >= VAIN)
        spin_ns = FAR_SPIN * self._spin_ns if far else self._spin_ns
        self._began_ns = now
        try:
            while now < deadline:
                if often and self._spin(ready, now, now + spin_ns):
                    return True
                now = _now_ns()
                rung = self._sleep(ready, now, deadline)
                if self.on_slept is not None:
                    self.on_slept(_now_ns() - now)
                if ready():
                    return True
                if not rung:
                    often = False
                elif self._sockets is None:  # for another source, or for what was found without waiting: forget them
                    futex.sem_drain(self.address)
                    if ready():
                        return True
                now = _now_ns()
            return False
        finally:
            late = _now_ns() - self._began_ns > spin_ns + self._spin_ns  # it takes time to wake up, too
            self._long = self._long + 1 if late else 0
            self._waiting = False

    def _spin(self, ready: Callable[[], object], now: int, until: int) -> bool:
        while now < until:
            _sched_yield()
            if self._sockets is not None:
                self._sockets.look()
            if ready():
                return True
            now = _now_ns()
        return False

    def _sleep(self, ready: Callable[[], object], now: int, deadline: int) -> bool:
        until = min(deadline, now + SLICE_NS)
        if self._sockets is None:
            return futex.sem_wait_until(self.address, until)
        self._sockets.sleep(ready, until - now)
        return True

    def __enter__(self) -> Doorbell:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
