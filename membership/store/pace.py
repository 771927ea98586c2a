"""How long the store takes to answer of late, and how long a lease must last for it to be renewed in time.

Where etcd has no processor or a slow disk, answers take seconds. Leases of three seconds then end although their
holders live, and each new holder meets the same: see docs/adr/013.
"""

from __future__ import annotations

import threading
from collections import deque
from statistics import median_low

from membership.base.timing import LEASE_TTL_MAX_S, STORE_CALL_TIMEOUT_S

CALLS = 5  # that count; their median, so that one slow call says nothing
ANSWERS = 6  # that a lease lasts for: two for each of its three renewals
STEP = 2.0  # between the times to live that there are: few, so that a lease is seldom changed
MOST_DOUBLINGS = 16  # more is beyond any bound, and in the end no number: an outage may last for hours


class Pace:
    """The time of the last calls that were answered. One that was not says nothing: its host may be cut off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._took: deque[float] = deque(maxlen=CALLS)

    def note(self, took_s: float) -> None:
        """A call was answered after this time."""
        with self._lock:
            self._took.append(took_s)

    @property
    def seconds(self) -> float:
        """What a call takes; 0 before the first."""
        with self._lock:
            return median_low(self._took) if self._took else 0.0


def fitting_ttl_s(configured_s: float, pace_s: float, held_s: float = 0.0) -> float:
    """The time to live of a lease at this pace: the configured one, or as often doubled as it takes.

    One that is held (`held_s`) is shortened only if it would be too long at twice the pace as well.
    """
    wanted_s = _at(configured_s, pace_s)
    return wanted_s if wanted_s >= held_s else min(held_s, _at(configured_s, 2 * pace_s))


def renewal_timeout_s(ttl_s: float, unanswered: int) -> float:
    """How long a renewal is waited for: a third of the lease's life, and twice as long after each without an answer.

    Else a store that takes longer than that would never get an answer to us, not even that the lease has ended.
    """
    third_s = ttl_s / 3
    return max(third_s, min(third_s * 2.0 ** min(unanswered, MOST_DOUBLINGS), STORE_CALL_TIMEOUT_S))


def _at(configured_s: float, pace_s: float) -> float:
    ttl_s, most_s = configured_s, max(configured_s, LEASE_TTL_MAX_S)
    while ttl_s < min(ANSWERS * pace_s, most_s):
        ttl_s = min(STEP * ttl_s, most_s)
    return ttl_s
