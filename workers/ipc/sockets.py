"""Sockets beside a doorbell: the thread that waits on it reads them itself, so that what comes from another host
changes threads no more often than it must.

Such a thread sleeps in epoll, which knows nothing of semaphores: a relay thread sleeps on the bell's in its place, and
passes a ring on if that thread sleeps. So rings cost a turn of a thread more here; doorbells without sockets have none.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Protocol

from membership.base.attempts import is_shortage
from membership.base.errors import WaitTimeout
from workers.ipc import futex
from workers.ipc.shared_memory import Segment

STOP_TIMEOUT_S = 5.0
NAP_NS = 5_000_000
SLICE_NS = 500_000_000  # the longest sleep of the relay: rings wake it, its end too


class Source(Protocol):
    """A socket that is read by the thread that waits."""

    def fileno(self) -> int:
        """Its descriptor, as long as it is watched."""

    def pump(self) -> None:
        """Read what there is, without blocking. It may have been closed meanwhile. It raises nothing."""


class Sockets:
    """The sockets of one doorbell. Any thread adds and removes them; only the waiting one calls `look` and `sleep`."""

    def __init__(self, bell: Segment) -> None:
        """`bell`: the memory of its semaphore, kept while the relay may sleep there. A doorbell that is dropped without
        being closed would unmap it, and end the process.
        """
        self._memory, self._bell = bell, bell.address
        self._sources: dict[int, Source] = {}
        self._lock = threading.Lock()
        self._ring = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._ring, select.EPOLLIN)
        self._asleep = self._stopping = False
        self._relay: threading.Thread | None = None

    def add(self, source: Source) -> None:
        """It is read from now on."""
        with self._lock:
            self._sources[source.fileno()] = source
            self._epoll.register(source.fileno(), select.EPOLLIN)

    def discard(self, source: Source) -> None:
        """It is not any more; before it is closed. Nothing happens if it was not watched."""
        with self._lock:
            if self._sources.get(source.fileno()) is source:
                del self._sources[source.fileno()]
                self._epoll.unregister(source.fileno())

    def look(self) -> None:
        """Read what there is."""
        for fd, _ in self._epoll.poll(0):
            self._pump(fd)

    def sleep(self, ready: Callable[[], object], timeout_ns: int) -> None:
        """Until something arrives, a ring comes or the time is over, unless `ready()`; and read what there is."""
        if self._relay is None and not self._has_relay():
            return self._nap(timeout_ns)
        self._asleep = True
        try:
            if ready():  # what was rung before the relay could see that we sleep
                return
            for fd, _ in self._epoll.poll(timeout_ns / 1e9):
                self._pump(fd)
        finally:
            self._asleep = False

    def _has_relay(self) -> bool:
        """Start it, by this thread: no other one sleeps on the semaphore from now on. False: the machine lacks one."""
        relay = threading.Thread(target=self._pass_on, name="doorbell-relay", daemon=True)
        try:
            relay.start()
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            return False
        self._relay = relay
        return True

    def _nap(self, timeout_ns: int) -> None:
        """Without a relay: rings wake it, sockets wait for its end."""
        if futex.sem_wait_until(self._bell, time.monotonic_ns() + min(timeout_ns, NAP_NS)):
            futex.sem_drain(self._bell)
        self.look()

    def close(self) -> None:
        """Stop the relay; the sockets are their owners'."""
        self._stopping = True
        if self._relay is not None:
            futex.sem_post(self._bell)
            self._relay.join(STOP_TIMEOUT_S)
            if self._relay.is_alive():
                raise WaitTimeout("a doorbell's relay did not end")
        self._epoll.close()
        os.close(self._ring)

    def _pump(self, fd: int) -> None:
        if fd == self._ring:
            os.eventfd_read(fd)
        elif (source := self._sources.get(fd)) is not None:
            source.pump()

    def _pass_on(self) -> None:
        while not self._stopping:
            if futex.sem_wait_until(self._bell, time.monotonic_ns() + SLICE_NS):
                futex.sem_drain(self._bell)
                if self._asleep:
                    os.eventfd_write(self._ring, 1)
