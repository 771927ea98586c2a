"""A switch that turns detection and masking off and on in a running cluster, for paired runs of what they cost.

Off: watchers do not wait on the robust futex, heartbeats stop, agents do not check them, the engine's watchdog does
not follow steps, main threads do not count their sleeps, and ranks do not look at the live mask. One page, mapped by
all processes, says which; reading it costs both sides the same. Only for benchmarks: while it is off, a dead rank is
not noticed.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

SWITCH = "RECOVERY_SWITCH"
PAUSE_S = 0.25  # how often a thread that is off looks whether it is on again
GRACE_S = 2.0  # for heartbeats to go on before a rank is suspected


class Switch:
    """The page: a byte (1: on) and when it was last changed (monotonic)."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    @classmethod
    def create(cls, path: Path) -> Switch:
        """A page that says on."""
        path.write_bytes(bytes(mmap.PAGESIZE))
        switch = cls(path)
        switch.turn(on=True)
        return switch

    def turn(self, *, on: bool) -> None:
        """Switch."""
        self._page[8:16] = struct.pack("d", time.monotonic())
        self._page[0] = on

    @property
    def on(self) -> bool:
        """Whether there is detection and masking."""
        return self._page[0] == 1

    @property
    def judging(self) -> bool:
        """On for long enough to suspect a rank."""
        changed_at: float = struct.unpack("d", self._page[8:16])[0]
        return self.on and time.monotonic() - changed_at > GRACE_S


def install() -> None:
    """Put the switch, if the environment names one, into what this process has of detection and masking."""
    path = os.environ.get(SWITCH)
    if not path:
        return
    import workers.agent.decide as decide
    import workers.protocol.liveness as liveness
    from workers.fleet.watchdog import Watchdog

    switch = Switch(Path(path))
    look, hung, advancing = liveness.DeathWatcher._look, decide.hung, decide.advancing

    def look_if_on(watcher: liveness.DeathWatcher) -> str:
        if switch.on:
            return look(watcher)
        watcher._stopping.wait(timeout=PAUSE_S)
        return ""

    def heartbeat_if_on(page: liveness.LivenessPage, every_s: float) -> None:
        while not page._stop.wait(timeout=every_s if switch.on else PAUSE_S):
            if switch.on:
                page._counters[0] += 1

    began, slept = Watchdog.began, liveness.LivenessPage.slept
    Watchdog.began = lambda dog, step, ranks, now: began(dog, step, ranks if switch.judging else (), now)
    liveness.LivenessPage.slept = lambda page, ns: slept(page, ns) if switch.on else None
    liveness.DeathWatcher._look = look_if_on
    liveness.LivenessPage._beat = heartbeat_if_on
    decide.hung = lambda *given, **named: switch.judging and hung(*given, **named)
    decide.advancing = lambda beat: not switch.judging or advancing(beat)
    _mask_if_on(switch)


def _mask_if_on(switch: Switch) -> None:
    import workers.rank.worker as worker

    masked = worker.EPWorker.masked
    worker.EPWorker.masked = lambda rank: masked(rank) if switch.on else 0
