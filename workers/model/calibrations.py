"""What was measured of this machine's kernels: one rank of a host measures it, the others look it up.

It is kept in the host's weight store beside the weights, under the kernel fingerprint (CPU kind, torch build, device,
the very bits of some kernels), and ends with the store. Without a store each rank measures by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import msgspec
import structlog

from workers.model.shared_weights import SharedWeights
from workers.protocol.load_progress import LoadProgress

log = structlog.get_logger(__name__)


class Calibrations:
    """Lists of numbers by what they are for. Safe to use from several threads."""

    def __init__(
        self, shared: SharedWeights | None = None, name: str = "", progress: LoadProgress | None = None
    ) -> None:
        self._progress = progress or LoadProgress()
        self._shared, self._name = shared, f"calibration/{name}"
        self._lock = threading.Lock()
        self._new = False
        found = shared.find([self._name]).get(self._name) if shared is not None else None
        self._known = msgspec.json.decode(found.note, type=dict[str, tuple[int, ...]]) if found is not None else {}

    def of(self, what: str, measure: Callable[[], Sequence[int]]) -> tuple[int, ...]:
        """The numbers for `what`; measured now if they are unknown."""
        with self._lock:
            if what not in self._known:
                self._known[what] = tuple(measure())
                self._progress.mark()
                self._new = True
            return self._known[what]

    def keep(self) -> None:
        """Leave what was measured to the next ranks."""
        with self._lock:
            new, self._new = self._new, False
            note = msgspec.json.encode(self._known)
        if self._shared is None:
            return
        if new:
            log.info("calibrated", what=self._name, numbers=len(self._known))
            self._shared.put(self._name, {}, note)
        self._shared.report()
