"""What was measured of this machine's kernels: one rank of a host measures it, once; all others look it up.

It is kept in the host's weight store beside the weights, under the kernel fingerprint (CPU kind, torch build, device,
the very bits of some kernels), and on disk (`kept_calibrations.py`) for the next start. Ranks that need it at the same
time do not measure at the same time: that would take three times as long. Without either each rank measures by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import msgspec
import structlog

from workers.model.kept_calibrations import KeptCalibrations, Known
from workers.model.shared_weights import SIGN_TIMEOUT_S, Session, SharedWeights
from workers.protocol.load_progress import LoadProgress

log = structlog.get_logger(__name__)


class Calibrations:
    """Lists of numbers by what they are for. Safe to use from several threads."""

    def __init__(
        self,
        shared: SharedWeights | None = None,
        name: str = "",
        progress: LoadProgress | None = None,
        kept: KeptCalibrations | None = None,
    ) -> None:
        self._progress = progress or LoadProgress()
        self._shared, self._name, self._kept = shared, f"calibration/{name}", kept
        self._lock = threading.Lock()
        self._measuring = ExitStack()  # the claim that keeps others from measuring too
        self._session: Session | None = None
        self._new = False
        self._known: Known = {**(kept.load() if kept is not None else {}), **self._found()}

    def of(self, what: str, measure: Callable[[], Sequence[int]]) -> tuple[int, ...]:
        """The numbers for `what`; measured now if they are unknown. `keep` follows, after an error too."""
        with self._lock:
            if what not in self._known and self._session is None and self._shared is not None:
                self._await_others(self._shared)
            if what not in self._known:
                if self._session is not None:
                    self._session.still_reads()
                self._known[what] = tuple(measure())
                self._progress.mark()
                self._new = True
            return self._known[what]

    def keep(self) -> None:
        """Leave what was measured to the next ranks."""
        with self._lock:
            new, self._new = self._new, False
            if new and self._kept is not None:
                self._kept.save(self._known)
            if new and self._shared is not None:
                log.info("calibrated", what=self._name, numbers=len(self._known))
                self._shared.put(self._name, {}, msgspec.json.encode(self._known))
            if self._shared is not None:
                self._shared.report()
            self._session = None
            self._measuring.close()

    def _found(self) -> Known:
        found = self._shared.find([self._name]).get(self._name) if self._shared is not None else None
        return msgspec.json.decode(found.note, type=Known) if found is not None else {}

    def _await_others(self, shared: SharedWeights) -> None:
        """Claim the measuring; if another rank has it, wait for what that leaves."""
        self._session = session = self._measuring.enter_context(shared.session(self._progress))
        while True:
            found, ours = session.claim([self._name])
            if found:
                self._known |= self._found()
                return
            if ours or not session.wait(SIGN_TIMEOUT_S):
                return
