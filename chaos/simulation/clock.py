"""Virtual time. Nothing waits: what would wait in the product asks to be called later."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

WALL_S = 1_700_000_000.0  # wall-clock time at time 0

Call = Callable[..., None]


class Clock:
    """Makes calls in the order of their times. Those for the same time are made in the order of scheduling."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0  # made so far
        self._due: list[tuple[float, int, Call, tuple[Any, ...]]] = []
        self._numbers = count()

    def __call__(self) -> float:
        return self.now

    def after(self, delay_s: float, call: Call, *args: Any) -> None:
        """Schedule `call(*args)` in `delay_s`."""
        heapq.heappush(self._due, (self.now + delay_s, next(self._numbers), call, args))

    def run(self, until: float) -> None:
        """Make all calls up to the time `until`."""
        while self._due and self._due[0][0] <= until:
            self.now, _, call, args = heapq.heappop(self._due)
            self.calls += 1
            call(*args)
        self.now = until


class Worst:
    """How bad something is: the largest of what several faults make it, of which each ends by itself."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._faults: list[tuple[float, float]] = []  # (until when, how bad)

    def add(self, how_bad: float, seconds: float) -> None:
        """For so long from now on."""
        self._faults.append((self._clock.now + seconds, how_bad))

    def now(self) -> float:
        """0 if no fault is left."""
        self._faults = [fault for fault in self._faults if fault[0] > self._clock.now]
        return max((how_bad for _, how_bad in self._faults), default=0.0)

    def clear(self) -> None:
        """No fault is left."""
        self._faults.clear()
