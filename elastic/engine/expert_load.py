"""How often each expert was used recently: summed over the ranks' answers, published for the planner.

A sliding window, so that a lasting change of load shows and a burst does not. It is published only when it differs
clearly from the last published load: the planner needs nothing else, and the store is spared the noise.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from membership.store.records import ExpertLoad

PERIOD_S = 5.0
PERIODS = 12  # that make up the window
ENOUGH = 32  # rows per expert of a layer, on average, before the window means anything
DIFFERENT = 4  # of an expert's load, in 16ths of the mean
REPEAT = 12  # periods after which it is published again anyway: the last one may not have reached the store


class LoadWindow:
    """The rows routed to each (MoE layer, expert) over the last minute."""

    def __init__(self, moe_layers: int, experts: int, now: float) -> None:
        self._shape = (moe_layers, experts)
        self._now = np.zeros(moe_layers * experts, dtype=np.int64)
        self._past: deque[np.ndarray] = deque(maxlen=PERIODS)
        self._ends = now + PERIOD_S
        self._published: np.ndarray | None = None
        self._silent = 0  # periods since it was published

    def add(self, load: bytes) -> None:
        """One rank's count of some steps: uint32[moe_layers, experts]; empty if it reports nothing now."""
        if len(load) == 4 * self._now.size:
            self._now += np.frombuffer(load, dtype=np.uint32)

    def due(self, now: float, wall: float) -> ExpertLoad | None:
        """Return the load to publish, or None. Cheap: does nothing until the current period ends."""
        if now < self._ends:
            return None
        self._ends = now + PERIOD_S
        self._silent += 1
        self._past.append(self._now)
        self._now = np.zeros_like(self._now)
        total = np.sum(self._past, axis=0).reshape(self._shape)
        mean = total.mean(axis=1, keepdims=True)
        if mean.min(initial=np.inf) < ENOUGH:
            return None
        loads = np.rint(16 * total / mean).astype(np.int64)
        if self._published is not None and self._silent < REPEAT and np.abs(loads - self._published).max() < DIFFERENT:
            return None
        self._published, self._silent = loads, 0
        return ExpertLoad(at=wall, loads=tuple(map(tuple, loads.tolist())))
