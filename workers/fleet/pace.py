"""Which rank is far slower than the others: it is flagged for people to look at, never evicted.

All ranks of a step end it together, so the time of its answers does not show a slow one. It waits less: its main thread
works while those of the others sleep on their doorbells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from statistics import median

from membership.base.timing import PACE_WINDOW_S

WINDOWS = 2  # in a row: a single one may have held a rank's long prefill
SLOW_FACTOR, RECOVERED_FACTOR = 4.0, 2.0  # x the others' median time per chunk
MIN_SHARE, MIN_CHUNKS = 0.3, 10  # a rank that hardly works is not compared


def slow_ranks(busy_s: Mapping[int, float], chunks: Mapping[int, int], now_slow: Collection[int]) -> dict[int, float]:
    """Ranks far slower than the others by their time per chunk, and by what factor. Once slow, a rank stays so longer.

    `busy_s` is the time in which a rank did not wait for others; only ranks that had work are compared.
    """
    pace = {rank: busy / chunks[rank] for rank, busy in busy_s.items() if chunks.get(rank, 0) >= MIN_CHUNKS}
    found = {}
    for rank, mine in pace.items():
        others = [theirs for other, theirs in pace.items() if other != rank]
        if not others or busy_s[rank] < MIN_SHARE * PACE_WINDOW_S:
            continue
        factor = mine / max(median(others), 1e-9)
        if factor >= (RECOVERED_FACTOR if rank in now_slow else SLOW_FACTOR):
            found[rank] = factor
    return found


class Pace:
    """The window under way, and the ranks that are slow by the ones before. The caller passes the time."""

    def __init__(self, now: float) -> None:
        self.due = now + PACE_WINDOW_S  # when to call `compare`
        self.slow: dict[int, float] = {}  # rank -> by what factor
        self._began = now
        self._chunks: Counter[int] = Counter()
        self._waited_s: dict[int, float] = {}
        self._suspected: Counter[int] = Counter()  # rank -> in how many windows in a row

    def worked(self, ranks: Mapping[int, Collection[object]]) -> None:
        """A step gave these ranks these chunks."""
        for rank, chunks in ranks.items():
            self._chunks[rank] += len(chunks)

    def compare(self, waited_s: Mapping[int, float], now: float) -> None:
        """The window ends; `waited_s` is how long each rank has slept on its doorbell since it started."""
        window_s = now - self._began
        busy_s = {
            rank: max(0.0, window_s - (waited - self._waited_s[rank]))
            for rank, waited in waited_s.items() if rank in self._waited_s
        }  # fmt: skip
        found = slow_ranks(busy_s, self._chunks, self.slow)
        self._suspected = Counter({rank: self._suspected[rank] + 1 for rank in found})
        self.slow = {r: factor for r, factor in found.items() if r in self.slow or self._suspected[r] >= WINDOWS}
        self._chunks.clear()
        self._waited_s = dict(waited_s)
        self._began, self.due = now, now + PACE_WINDOW_S

    def gone(self, rank: int) -> None:
        """The rank is out of use; another one may take its number."""
        for known in (self.slow, self._waited_s, self._suspected):
            known.pop(rank, None)
