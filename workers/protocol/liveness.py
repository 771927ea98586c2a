"""A rank's liveness page, and the watcher that tells its death.

The page holds a robust mutex that the rank's main thread takes at the start and keeps: when that thread ends, in
whatever way, the kernel hands the mutex over before it tears the process down. That takes 0.25 ms whatever the size
of the process, where a pidfd or a pipe's end of file wait for the memory to be freed (90 ms and more at 2 GB). The
pidfd is the second opinion: it also knows of a rank that let the mutex go. Counters tell a rank that is alive from
one that is stuck: `beats` rises with time (the interpreter runs), `steps` with work, `turns` whenever the main thread
wakes on its doorbell.
"""

from __future__ import annotations

import os
import secrets
import select
import threading
from collections.abc import Callable
from types import TracebackType

import msgspec

from membership.base.enums import DetectedBy
from membership.base.errors import ConfigError
from workers.ipc import handover
from workers.ipc.futex import MUTEX_BYTES, RobustMutex
from workers.ipc.handover import Grant, Handover
from workers.ipc.shared_memory import PAGE, Segment

BEAT_S = 0.1
SLICE_S = 0.2  # how long a watcher sleeps at most before it looks whether it should stop
STOP_TIMEOUT_S = 5.0
_BEATS, _STEPS, _TURNS, _WAITED = range(4)  # 64-bit words behind the mutex


class LivenessHandle(msgspec.Struct, frozen=True, array_like=True):
    """Where to get the page, and whose it is."""

    address: str
    resource: str
    pid: int


class LivenessPage:
    """Made by `create` in the rank's main thread, mapped by `attach` in whoever watches it."""

    def __init__(self, segment: Segment, pid: int, resource: str = "") -> None:
        self.pid = pid
        self.mutex = RobustMutex(segment.address)
        self._segment = segment
        self._resource = resource
        self._counters = segment.view(MUTEX_BYTES, 32, "Q")
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None
        self._holder = 0

    @classmethod
    def create(cls, beat_s: float = BEAT_S) -> LivenessPage:
        """Take the mutex for the calling thread, whose end will be the rank's death, and start the beat."""
        page = cls(Segment.create(PAGE, "elastic-ep-liveness"), os.getpid(), f"liveness-{secrets.token_hex(8)}")
        page.mutex.initialise()
        page.mutex.lock_now()
        page._holder = threading.get_ident()
        page._beating = threading.Thread(target=page._beat, args=(beat_s,), name="liveness-beat", daemon=True)
        page._beating.start()
        Handover.default().serve(page._resource, page._grant)
        return page

    @classmethod
    def attach(cls, handle: bytes, timeout_s: float = 5.0) -> LivenessPage:
        """Map the page of `handle`. QueueClosed if its process is gone already."""
        where = msgspec.msgpack.decode(handle, type=LivenessHandle)
        link = Handover.default().connect(where.address, where.resource, timeout_s=timeout_s)
        try:
            if len(link.reply_fds) != 1 or link.peer_pid != where.pid:
                raise ConfigError("this is not the handle of a rank's liveness page")
            return cls(Segment.attach(link.reply_fds[0], PAGE), where.pid)
        finally:
            link.close()

    def export_handle(self) -> bytes:
        """What `attach` needs."""
        return msgspec.msgpack.encode(LivenessHandle(Handover.default().address, self._resource, self.pid))

    @property
    def beats(self) -> int:
        """Rises every BEAT_S while the rank's interpreter runs."""
        return self._counters[_BEATS]

    @property
    def steps(self) -> int:
        """Rises with each piece of work that the rank's main loop has done."""
        return self._counters[_STEPS]

    @property
    def turns(self) -> int:
        """Rises whenever the rank's main thread wakes on its doorbell: at least twice per second while it waits."""
        return self._counters[_TURNS]

    @property
    def waited_s(self) -> float:
        """How long the rank's main thread has slept on its doorbell so far."""
        return self._counters[_WAITED] / 1e9

    def slept(self, ns: int) -> None:
        """Count one sleep on the doorbell; in the rank's main thread."""
        self._counters[_TURNS] += 1
        self._counters[_WAITED] += ns

    def progress(self) -> None:
        """Count one piece of work; in the rank's main loop."""
        self._counters[_STEPS] += 1

    def close(self) -> None:
        """Unmap. In the rank: stop the beat and let the mutex go, by the thread that took it."""
        if self._beating is not None:
            self._stop.set()
            self._beating.join(timeout=STOP_TIMEOUT_S)
            self._beating = None
            Handover.default().withdraw(self._resource)
            if threading.get_ident() == self._holder:
                self.mutex.unlock()
        self._segment.close()

    def _beat(self, every_s: float) -> None:
        while not self._stop.wait(timeout=every_s):
            self._counters[_BEATS] += 1

    def _grant(self, link: handover.Link, request: bytes, fds: list[int]) -> Grant:
        return Grant(fds=[self._segment.fileno()])

    def __enter__(self) -> LivenessPage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class DeathWatcher:
    """Calls `on_death(detected_by)` once, in its own thread, when the page's process is dead; not after `stop`."""

    def __init__(self, page: LivenessPage, pid: int, on_death: Callable[[DetectedBy], None]) -> None:
        self._page = page
        self._on_death = on_death
        self._stopping = threading.Event()
        self._pidfd = _open(pid)
        self._thread = threading.Thread(target=self._watch, name=f"death-of-{pid}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; returns when the thread has ended (it may be called from `on_death`). The page stays open."""
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=STOP_TIMEOUT_S)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _watch(self) -> None:
        while not self._stopping.is_set():
            source = self._look()
            if source is not None and not self._stopping.is_set():
                self._on_death(source)
                return

    def _look(self) -> DetectedBy | None:
        """How the death was noticed within this slice, if it was."""
        if self._pidfd < 0:
            return DetectedBy.PIDFD
        died = self._page.mutex.owner_died(SLICE_S)
        if died:
            return DetectedBy.ROBUST_FUTEX
        # The mutex is free: the rank has released it and is about to end, so wait on the process itself.
        return DetectedBy.PIDFD if _gone(self._pidfd, SLICE_S if died is None else 0.0) else None


def watch_death(page: LivenessPage, pid: int, on_death: Callable[[DetectedBy], None]) -> DeathWatcher:
    """Watch process `pid`, whose page this is; a process that is gone already is reported at once."""
    return DeathWatcher(page, pid, on_death)


def _open(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def _gone(pidfd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
