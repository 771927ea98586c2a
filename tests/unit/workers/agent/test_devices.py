"""What an agent makes of its ranks' notes: a record per incarnation, events of what is new, the reason of a death."""

from __future__ import annotations

from typing import Any

import pytest

from membership.base.rank_id import RankId
from membership.store.records import GpuUse
from workers.agent.devices import Devices
from workers.protocol.device_note import NOTHING, DeviceNote

pytestmark = pytest.mark.unit

ONE, TWO = RankId(0, 11), RankId(1, 12)


class Page:
    def __init__(self, note: DeviceNote = NOTHING) -> None:
        self.note = note


def gpu(graphs: int = 0) -> DeviceNote:
    return DeviceNote(gpu=GpuUse(index=1, uuid="GPU-8f", free=3, total=9, graphs=graphs, graph_rows=(4,) * graphs))


def told(events: list[tuple[str, RankId, dict[str, Any]]]) -> list[tuple[str, int]]:
    found = [(kind, key.rank) for kind, key, _ in events]
    events.clear()
    return found


def test_notes_are_published_and_only_news_are_told() -> None:
    events: list[tuple[str, RankId, dict[str, Any]]] = []
    devices = Devices(lambda kind, key, **fields: events.append((kind, key, fields)))
    pages = {ONE: Page(gpu()), TWO: Page()}
    assert devices.look(pages) == {11: gpu().gpu}
    assert events == [("gpu_taken", ONE, {"gpu": 1, "uuid": "GPU-8f", "total": 9})]
    events.clear()
    pages[ONE].note = NOTHING  # it is being written
    assert devices.look(pages) == {11: gpu().gpu}
    pages[ONE].note = gpu(2)
    assert devices.look(pages) == {11: gpu(2).gpu}
    assert events == [("steps_recorded", ONE, {"gpu": 1, "graphs": 2, "rows": [4, 4]})]
    events.clear()
    assert devices.look(pages) == {11: gpu(2).gpu}
    assert devices.look({TWO: pages[TWO]}) == {}
    assert told(events) == []


def test_a_rank_whose_device_failed_it_has_the_last_word() -> None:
    events: list[tuple[str, RankId, dict[str, Any]]] = []
    devices = Devices(lambda kind, key, **fields: events.append((kind, key, fields)))
    pages = {ONE: Page(gpu()), TWO: Page(gpu())}
    devices.look(pages)
    events.clear()
    pages[ONE].note = DeviceNote(last_words="cuda:1: unspecified launch failure")
    assert devices.died(ONE, pages[ONE]) == pages[ONE].note
    assert events == [
        ("device_failed", ONE, {"reason": "cuda:1: unspecified launch failure", "gpu": 1, "uuid": "GPU-8f"})
    ]
    events.clear()
    assert not devices.died(TWO, pages[TWO]).last_words, "it was killed"
    assert devices.died(RankId(2, 13), None) == NOTHING, "it is gone altogether"
    assert told(events) == []
