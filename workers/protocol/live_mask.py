"""The live mask: a page that the engine writes and all its ranks map. It says at once which ranks must not be used.

A set bit means: not to be used. Within an epoch the set only grows. For each rank the page also has the last
incarnation that the engine evicted: one that still runs finds that there, in any later epoch too. The writer rings the
ranks' doorbells after a change; readers look at the page whenever they wake.
"""

from __future__ import annotations

from collections.abc import Iterable

from membership.base.errors import ConfigError
from membership.store.records import MAX_RANKS
from workers.ipc.fence import fence
from workers.ipc.shared_memory import Segment
from workers.ipc.shared_page import SharedPage
from workers.protocol.step_fence import is_evicted

_WORDS = MAX_RANKS // 64  # 64-bit words of the set; the generation follows, then each rank's last evicted incarnation


class LiveMask(SharedPage):
    """A set of masked ranks. One process writes, the one that made the page."""

    kind = "livemask"

    def __init__(self, segment: Segment, pid: int = 0, resource: str = "") -> None:
        super().__init__(segment, pid, resource)
        self._words = segment.view(0, 8 * (_WORDS + 1 + MAX_RANKS), "Q")
        self._known = (-1, 0)

    @property
    def generation(self) -> int:
        """Rises with each change."""
        return self._words[_WORDS]

    def masked(self) -> int:
        """The set as bits: bit r is set if rank r is masked."""
        generation = self._words[_WORDS]
        fence()
        if generation != self._known[0]:
            self._known = (generation, sum(self._words[i] << 64 * i for i in range(_WORDS)))
        return self._known[1]

    def mask(self, rank: int) -> None:
        """Add a rank."""
        self._write(self._bits([rank]) | self._now())

    def evict(self, rank: int, incarnation: int) -> None:
        """This incarnation, and any before it, is given up for good."""
        self._bits([rank])
        at = _WORDS + 1 + rank
        self._words[at] = max(self._words[at], incarnation)

    def evicted(self, rank: int, incarnation: int) -> bool:
        """Whether this incarnation was given up."""
        return is_evicted(incarnation, self._words[_WORDS + 1 + rank])

    def reset(self, ranks: Iterable[int] = ()) -> None:
        """Make these the whole set: a new epoch begins."""
        self._write(self._bits(ranks))

    def _now(self) -> int:
        return sum(self._words[i] << 64 * i for i in range(_WORDS))

    def _bits(self, ranks: Iterable[int]) -> int:
        bits = 0
        for rank in ranks:
            if not 0 <= rank < MAX_RANKS:
                raise ConfigError(f"rank {rank} does not fit in a live mask of {MAX_RANKS} ranks")
            bits |= 1 << rank
        return bits

    def _write(self, bits: int) -> None:
        for i in range(_WORDS):
            self._words[i] = bits >> 64 * i & (2**64 - 1)
        fence()
        self._words[_WORDS] += 1
