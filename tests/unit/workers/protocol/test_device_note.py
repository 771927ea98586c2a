"""The note about a rank's device: what was written is read, and nothing of a note that is being written."""

from __future__ import annotations

import pytest

from membership.store.records import GpuUse
from workers.protocol.device_note import MOST_BYTES, NOTE_BYTES, NOTHING, DeviceNote, DeviceNotes

pytestmark = pytest.mark.unit

GPU = GpuUse(index=1, uuid="GPU-8f", free=5, total=9, graphs=2, graph_rows=(1, 32), recorded_at=7.5, exchange="cuda")


def test_the_last_note_is_read() -> None:
    notes = DeviceNotes()
    assert notes.read() == NOTHING
    for note in (DeviceNote(gpu=GPU), DeviceNote(last_words="cuda:1: launch failure"), DeviceNote(gpu=GPU)):
        notes.write(note)
        assert notes.read() == note


def test_a_note_that_is_cut_short_or_mixed_with_another_says_nothing() -> None:
    memory = memoryview(bytearray(NOTE_BYTES))
    notes = DeviceNotes(memory)
    notes.write(DeviceNote(gpu=GPU))
    whole = bytes(memory)
    notes.write(DeviceNote(last_words="some other words"))
    other = bytes(memory)
    for cut in range(1, 60):
        memory[:] = whole[:cut] + other[cut:]
        assert notes.read() in (NOTHING, DeviceNote(gpu=GPU), DeviceNote(last_words="some other words"))
    memory[:] = whole
    memory[20] ^= 1
    assert notes.read() == NOTHING


@pytest.mark.parametrize("letter", ["x", "\u20ac"])
def test_long_reasons_are_cut_and_still_read(letter: str) -> None:
    notes, long = DeviceNotes(), letter * 5000
    rows = tuple(range(1, 129))
    for note in (DeviceNote(last_words=long), DeviceNote(gpu=GpuUse(
        index=7, uuid="GPU-" + "8" * 36, free=1 << 40, total=1 << 40, graphs=999, graph_rows=rows, exchange="host",
        exchange_reason=long,
    ))):  # fmt: skip
        notes.write(note)
        said = notes.read()
        reason = said.last_words or (said.gpu.exchange_reason if said.gpu else "")
        assert 100 <= len(reason.encode()) <= MOST_BYTES
        assert set(reason) == {letter}
