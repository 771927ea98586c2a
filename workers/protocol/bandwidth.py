"""How fast a host's ranks may read weights while they serve: one bucket per host, and how a rank keeps to it.

The bucket is in the host's weight store (`agent/weight_store.py`), which serves all ranks of the host. Reads are booked
ahead: the answer is how long to wait first; none is refused.
"""

from __future__ import annotations

from collections.abc import Callable


class Bucket:
    """A token bucket that goes into debt. Pure: the time is passed in."""

    def __init__(self, per_s: float, burst_s: float = 0.1) -> None:
        self._per_s, self._burst_s = per_s, burst_s
        self._free_at = 0.0  # when all that was booked has been paid for

    def book(self, amount: float, now: float) -> float:
        """Book an amount; return after how many seconds it may be used. What is unused is kept for `burst_s`."""
        self._free_at = max(self._free_at, now - self._burst_s)
        wait_s = max(0.0, self._free_at - now)
        self._free_at += amount / self._per_s
        return wait_s


class Brake:
    """Called before each read while a rank prepares: waits as long as the host's bucket says.

    Waiting is no stall: `mark` is called at least every `mark_s`, as progress of the load.
    """

    def __init__(
        self, book: Callable[[], float], wait: Callable[[float], object], mark_s: float, mark: Callable[[], object]
    ) -> None:
        self._book, self._wait, self._mark_s, self._mark = book, wait, mark_s, mark

    def __call__(self) -> None:
        """Wait, if need be; not longer once `wait` says that it was broken off."""
        left_s = self._book()
        while left_s > 0 and not self._wait(min(left_s, self._mark_s)):
            left_s -= self._mark_s
            self._mark()
