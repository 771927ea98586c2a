"""Makes the wall clock of a Python process adjustable: imported by the interpreter itself, before anything else.

It is on the path only of processes that a chaos run started so (`chaos/faults/clock.py`), and alone: it imports nothing
of the project. `time.time` and `time.time_ns` add the offset that the file of offsets gives for this process. Once
it has noticed a change of its offset, it writes what its own clock says to the file `<file>.PID`. The monotonic
clock is left alone: no machine's jumps. So is grpc's reading of the wall clock: it gives its core deadlines as times,
which the core holds against the clock as it is; on a machine whose clock jumps the two agree.
"""

from __future__ import annotations

import json
import os
import sys
import time

_FILE = os.environ.get("ELASTIC_CHAOS_CLOCKS", "")
_LOOK_NS = 50_000_000  # between two looks at the file
_real_ns = time.time_ns
_monotonic_ns = time.monotonic_ns


class _Clock:
    """Offset seconds, and drift in seconds per second since it was given."""

    seconds = 0.0
    rate = 0.0
    since_ns = 0
    looked_ns = 0
    changed_ns = -1

    def offset_ns(self) -> int:
        now = _monotonic_ns()
        if now - self.looked_ns > _LOOK_NS:
            self.looked_ns = now
            self._look(now)
        return int(self.seconds * 1e9 + self.rate * (now - self.since_ns))

    def _look(self, now: int) -> None:
        try:
            changed_ns = os.stat(_FILE).st_mtime_ns
        except FileNotFoundError:
            return
        if changed_ns == self.changed_ns:
            return
        self.changed_ns = changed_ns
        with open(_FILE, encoding="utf-8") as file:
            given = json.load(file).get(str(os.getpid()), {})
        before = (self.seconds, self.rate)
        self.seconds, self.rate = float(given.get("seconds", 0.0)), float(given.get("rate", 0.0))
        self.since_ns = now
        if before != (self.seconds, self.rate):
            with open(f"{_FILE}.{os.getpid()}", "w", encoding="utf-8") as file:
                file.write(str(_time_ns() / 1e9))


_clock = _Clock()


def _time_ns() -> int:
    """Nanoseconds since the epoch, as this process is to believe."""
    return _real_ns() + _clock.offset_ns()


def _time() -> float:
    """Seconds since the epoch, as this process is to believe."""
    if sys._getframe(1).f_globals.get("__name__", "").startswith("grpc."):
        return _real_ns() / 1e9
    return _time_ns() / 1e9


if _FILE:
    time.time, time.time_ns = _time, _time_ns
