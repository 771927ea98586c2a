"""Virtual time: what is to happen when. Nothing waits; whoever would wait asks to be called later."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

WALL_S = 1_700_000_000.0  # the time of day at time 0

Call = Callable[..., None]


class Clock:
    """Calls in the order of their times; of two at the same time, the one asked for first."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0  # made so far
        self._due: list[tuple[float, int, Call, tuple[Any, ...]]] = []
        self._numbers = count()

    def __call__(self) -> float:
        return self.now

    def after(self, delay_s: float, call: Call, *args: Any) -> None:
        """Have `call(*args)` made in so many seconds."""
        heapq.heappush(self._due, (self.now + delay_s, next(self._numbers), call, args))

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._due and self._due[0][0] <= until:
            self.now, _, call, args = heapq.heappop(self._due)
            self.calls += 1
            call(*args)
        self.now = until
