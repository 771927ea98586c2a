"""When a rank says what it uses of its GPU (`device_note.py`): now and then, in its main thread between two steps.

Asking the driver takes some tens of microseconds, so it is not done in each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import structlog

from membership.store.records import View
from workers.protocol.device_note import DeviceNote, DeviceNotes

if TYPE_CHECKING:
    from workers.model.backend import Backend
    from workers.rank.gpu_exchange import GpuExchange

log = structlog.get_logger(__name__)

EVERY_S = 2.0
AGAIN_S = 60.0  # after one that failed: a lack of memory passes, another error is warned of rarely
NOT_WANTED = "served with --gpu-exchange 0"


class GpuReport:
    """Of one rank process."""

    def __init__(
        self,
        notes: DeviceNotes,
        off: str = "",
        clock: Callable[[], float] = time.monotonic,
        after: Callable[[BaseException], object] = lambda error: None,
    ) -> None:
        """`off`: why there is no exchange between GPUs, where it is known. `after` looks at what fails."""
        self._notes, self._off, self._clock = notes, off or NOT_WANTED, clock
        self._due_at = 0.0
        self._after = after

    def rest(self, backend: Backend | None, exchange: GpuExchange | None, view: View) -> None:
        """Call it often. It raises nothing: a rank that can go on must not end for the mere report."""
        if backend is None or (now := self._clock()) < self._due_at:
            return
        self._due_at = now + EVERY_S
        try:
            self._report(backend, exchange, view)
        except Exception as error:  # noqa: BLE001 - whatever it is
            self._after(error)
            self._due_at = now + AGAIN_S
            log.warning("gpu_not_reported", error=repr(error))

    def _report(self, backend: Backend, exchange: GpuExchange | None, view: View) -> None:
        if (gpu := backend.seen()) is not None:
            refusal = self._off if exchange is None else exchange.refusal(view)
            gpu = msgspec.structs.replace(gpu, exchange="host" if refusal else "cuda", exchange_reason=refusal)
            self._notes.write(DeviceNote(gpu=gpu))
