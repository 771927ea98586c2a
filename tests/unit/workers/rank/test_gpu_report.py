"""A rank says what it uses of its GPU now and then, and how its rows travel."""

from __future__ import annotations

from typing import Any, cast

import pytest

from membership.store.records import GpuUse, View
from workers.protocol.device_note import NOTHING, DeviceNotes
from workers.rank.gpu_report import AGAIN_S, EVERY_S, NOT_WANTED, GpuReport

pytestmark = pytest.mark.unit
VIEW = View(epoch=1)


class Device:
    """A backend, as far as it is asked."""

    def __init__(self, gpu: GpuUse | None) -> None:
        self.gpu, self.asked = gpu, 0

    def seen(self) -> GpuUse | None:
        self.asked += 1
        return self.gpu


class Exchange:
    def __init__(self, refusal: str) -> None:
        self._refusal = refusal

    def refusal(self, view: View) -> str:
        return self._refusal


@pytest.mark.parametrize(
    ("exchange", "said"),
    [
        (None, ("host", "there is one GPU here")),
        (Exchange("rank 1: no P2P between GPUs 0 and 1"), ("host", "rank 1: no P2P between GPUs 0 and 1")),
        (Exchange(""), ("cuda", "")),
    ],
)
def test_the_note_has_the_gpu_and_how_rows_travel(exchange: Any, said: tuple[str, str]) -> None:
    notes, device = DeviceNotes(), Device(GpuUse(index=1, uuid="u", free=2, total=9))
    GpuReport(notes, "there is one GPU here").rest(cast("Any", device), exchange, VIEW)
    gpu = notes.read().gpu
    assert gpu is not None
    assert (gpu.index, gpu.free, gpu.exchange, gpu.exchange_reason) == (1, 2, *said)


def test_the_device_is_not_asked_in_each_step() -> None:
    now = [100.0]
    notes, device = DeviceNotes(), Device(GpuUse(index=0, uuid="u", free=2, total=9))
    report = GpuReport(notes, clock=lambda: now[0])
    report.rest(None, None, VIEW)  # it has none yet
    for turn in range(1000):
        now[0] = 100.0 + turn * EVERY_S / 500
        report.rest(cast("Any", device), None, VIEW)
    assert device.asked == 2


def test_an_exchange_that_is_switched_off_is_called_so() -> None:
    notes = DeviceNotes()
    GpuReport(notes).rest(cast("Any", Device(GpuUse(index=1, uuid="u", free=2, total=9))), None, VIEW)
    gpu = notes.read().gpu
    assert gpu is not None
    assert gpu.exchange_reason == NOT_WANTED


def test_a_rank_without_a_gpu_says_nothing() -> None:
    notes = DeviceNotes()
    GpuReport(notes).rest(cast("Any", Device(None)), None, VIEW)
    assert notes.read() == NOTHING


def test_a_report_that_fails_is_looked_at_and_is_made_again_later() -> None:
    now, errors = [100.0], list[BaseException]()
    notes, device = DeviceNotes(), Device(GpuUse(index=0, uuid="u" * 5000, free=2, total=9))
    report = GpuReport(notes, clock=lambda: now[0], after=errors.append)
    for _ in range(3):
        report.rest(cast("Any", device), None, VIEW)
        now[0] += EVERY_S
    assert len(errors) == 1
    assert device.asked == 1
    assert notes.read() == NOTHING
    device.gpu = GpuUse(index=0, uuid="u", free=2, total=9)
    now[0] = 100.0 + AGAIN_S
    report.rest(cast("Any", device), None, VIEW)
    assert len(errors) == 1
    assert notes.read().gpu is not None
