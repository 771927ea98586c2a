"""A rank's liveness page, and the watcher that reports its death.

The page holds a robust mutex, which the rank's main thread takes at the start and keeps. When that thread ends, in
whatever way, the kernel hands the mutex over before it tears the process down: after 0.25 ms whatever the size of the
process. A pidfd or the end of a pipe waits until the memory is freed (90 ms and more at 2 GB). The pidfd is the second
source: it also covers a rank that has released the mutex. Counters show whether a live rank is stuck: `heartbeats`
rises with time (the interpreter runs), `steps` with work, `turns` whenever the main thread wakes on its doorbell.
One word is for the other direction: the engine or the agent writes it, and the rank's kernels on a GPU read it.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Self

from membership.base.attempts import Attempts
from membership.base.enums import DetectedBy
from workers.ipc.futex import MUTEX_BYTES, RobustMutex
from workers.ipc.shared_memory import PAGE, Segment
from workers.ipc.shared_page import SharedPage
from workers.protocol import load_progress
from workers.protocol.device_note import NOTE_BYTES, DeviceNote, DeviceNotes
from workers.protocol.load_progress import LoadProgress, LoadSeen

HEARTBEAT_S = 0.1
NUMBERS_PER_S = 1_000_000  # GPU calls are numbered by the host's clock, so a new engine's numbers are larger
SLICE_S = 0.2  # longest sleep of a watcher before it checks whether it should stop
STOP_TIMEOUT_S = 5.0
PASSED_ON_S = 0.01
_HEARTBEATS, _STEPS, _TURNS, _WAITED = range(4)  # 64-bit words behind the mutex; then those of the load
_COUNTERS = 4
_NOTE_AT = PAGE // 4
_CALLED_OFF_AT = PAGE // 2  # away from what the rank writes


class LivenessPage(SharedPage):
    """Made by `create` in the rank's main thread, mapped by `attach` in the processes that watch it."""

    kind = "liveness"

    def __init__(self, segment: Segment, pid: int, resource: str = "") -> None:
        super().__init__(segment, pid, resource)
        self.mutex = RobustMutex(segment.address)
        self._counters = segment.view(MUTEX_BYTES, 8 * _COUNTERS, "Q")
        self._load = segment.view(MUTEX_BYTES + 8 * _COUNTERS, 8 * load_progress.WORDS, "Q")
        self.load_progress = LoadProgress(self._load)  # for the rank itself
        self.notes = DeviceNotes(segment.view(_NOTE_AT, NOTE_BYTES))  # for the rank itself
        self._called_off = segment.view(_CALLED_OFF_AT, 8, "Q")
        self.called_off_at = segment.address + _CALLED_OFF_AT  # for the rank's kernels
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None
        self._holder = 0

    @classmethod
    def create(cls, heartbeat_s: float = HEARTBEAT_S) -> Self:
        """Take the mutex for the calling thread, whose end will be the rank's death, and start the heartbeat."""
        page = super().create()
        page.mutex.initialise()
        page.mutex.lock_now()
        page._holder = threading.get_ident()
        page._beating = threading.Thread(target=page._beat, args=(heartbeat_s,), name="liveness-heartbeat", daemon=True)
        page._beating.start()
        return page

    @property
    def heartbeats(self) -> int:
        """Rises every HEARTBEAT_S while the rank's interpreter runs."""
        return self._counters[_HEARTBEATS]

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

    @property
    def ended(self) -> bool:
        """Whether the rank's main thread has certainly ended, by the kernel's word. A watcher may just have got that
        word, and holds the mutex until it has its interpreter lock, which this lets go.
        """
        return bool(self.mutex.owner_died(PASSED_ON_S))

    @property
    def load(self) -> LoadSeen:
        """How far the rank has loaded."""
        return load_progress.seen(self._load)

    @property
    def note(self) -> DeviceNote:
        """What the rank says of its device."""
        return self.notes.read()

    @property
    def called_off(self) -> int:
        """GPU calls with smaller numbers are over."""
        return self._called_off[0]

    def call_off(self, below: int) -> None:
        """GPU calls with smaller numbers are over; by the engine. Never taken back, so it needs no clearing."""
        self._called_off[0] = max(below, self._called_off[0])

    def call_off_before(self, now: float) -> None:
        """All GPU calls of an engine that another one has replaced by `now`, of the monotonic clock; by the agent."""
        self.call_off(int(now * NUMBERS_PER_S))

    def slept(self, ns: int) -> None:
        """Count one sleep on the doorbell; in the rank's main thread."""
        self._counters[_TURNS] += 1
        self._counters[_WAITED] += ns

    def progress(self) -> None:
        """Count one piece of work; in the rank's main loop."""
        self._counters[_STEPS] += 1

    def close(self) -> None:
        """Unmap. In the rank: stop the heartbeat and release the mutex, in the thread that took it."""
        if self._beating is not None:
            self._stop.set()
            self._beating.join(timeout=STOP_TIMEOUT_S)
            self._beating = None
            if threading.get_ident() == self._holder:
                self.mutex.unlock()
        super().close()

    def _beat(self, every_s: float) -> None:
        while not self._stop.wait(timeout=every_s):
            self._counters[_HEARTBEATS] += 1


class DeathWatcher:
    """Calls `on_death(detected_by)` once, in its own thread, when the page's process is dead; not after `stop`."""

    def __init__(self, page: LivenessPage, on_death: Callable[[DetectedBy], None]) -> None:
        self._page = page
        self._on_death = on_death
        self._stopping = threading.Event()
        self._attempts = Attempts("death watcher")
        try:
            self._pidfd = os.pidfd_open(page.pid)
        except ProcessLookupError:  # dead already: reported at once
            self._pidfd = -1
        self._thread = threading.Thread(target=self._watch, name=f"death-of-{page.pid}", daemon=True)
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
        found: list[DetectedBy | None] = []
        while not self._stopping.is_set():
            if not self._attempts.run(lambda: found.append(self._look())):
                self._stopping.wait(SLICE_S)
            source = found.pop() if found else None
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
        return DetectedBy.PIDFD if process_ended(self._pidfd, SLICE_S if died is None else 0.0) else None


def process_ended(pidfd: int, timeout_s: float) -> bool:
    """Whether this process has ended within `timeout_s`."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
