"""What this node's ranks say of their devices (`device_note.py`): published with heartbeats, and reported as events.

Only news are reported: which GPU a rank took, steps that it recorded as graphs, and why it ended if its device failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from membership.base.rank_id import RankId
from membership.store.records import GpuUse
from workers.protocol.device_note import NOTHING, DeviceNote


class Noted(Protocol):
    """A rank's liveness page."""

    @property
    def note(self) -> DeviceNote:
        """What the rank said last."""


class Devices:
    """`emit`: an event about a rank."""

    def __init__(self, emit: Callable[..., None]) -> None:
        self._emit = emit
        self._seen: dict[RankId, GpuUse] = {}

    def look(self, pages: Mapping[RankId, Noted]) -> dict[int, GpuUse]:
        """By incarnation, of the ranks that are there. A note that is being written is that of before."""
        self._seen = {key: gpu for key, gpu in self._seen.items() if key in pages}
        for key, page in pages.items():
            if (gpu := page.note.gpu) is None:
                continue
            known = self._seen.get(key)
            if known is None:
                self._emit("gpu_taken", key, gpu=gpu.index, uuid=gpu.uuid, total=gpu.total)
            if gpu.graphs > (known.graphs if known is not None else 0):
                self._emit("steps_recorded", key, gpu=gpu.index, graphs=gpu.graphs, rows=list(gpu.graph_rows))
            self._seen[key] = gpu
        return {key.incarnation: gpu for key, gpu in self._seen.items()}

    def died(self, key: RankId, page: Noted | None) -> DeviceNote:
        """The rank's own last words, if it had any."""
        gpu, note = self._seen.pop(key, None), page.note if page is not None else NOTHING
        if note.last_words:
            where = {} if gpu is None else {"gpu": gpu.index, "uuid": gpu.uuid}
            self._emit("device_failed", key, reason=note.last_words, **where)
        return note
