"""What a rank says of its device: a note in its liveness page, read by its agent once per second and after its death.

For people, but for one decision: a slot whose ranks ended for want of device memory, one after the other, is set aside.
The rank's main thread writes it. A reader that comes amid a write finds another checksum, and learns nothing. What was
written last stays readable however the process ends, so a rank whose device fails it leaves the reason there.
"""

from __future__ import annotations

import zlib

import msgspec

from membership.store.records import GpuUse

NOTE_BYTES = 1024
_HEAD = 8  # length and checksum, before the note
MOST_BYTES = 400  # of `last_words` and of a reason: the rest of a note is short


class DeviceNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Empty before the first one."""

    gpu: GpuUse | None = None
    last_words: str = ""  # why the rank ends, if it is for its device
    full: bool = False  # and that had too little memory


NOTHING = DeviceNote()
_decoder = msgspec.msgpack.Decoder(DeviceNote)


class DeviceNotes:
    """The place of the note in a page, for its writer and its readers."""

    def __init__(self, memory: memoryview[int] | None = None) -> None:
        self._memory = memoryview(bytearray(NOTE_BYTES)) if memory is None else memory

    def write(self, note: DeviceNote) -> None:
        """Replace what was there. Long texts are cut."""
        gpu = note.gpu
        if gpu is not None:
            gpu = msgspec.structs.replace(gpu, exchange_reason=_cut(gpu.exchange_reason))
        said = msgspec.msgpack.encode(msgspec.structs.replace(note, gpu=gpu, last_words=_cut(note.last_words)))
        self._memory[:_HEAD] = bytes(_HEAD)
        self._memory[_HEAD : _HEAD + len(said)] = said
        self._memory[:_HEAD] = len(said).to_bytes(4, "little") + zlib.crc32(said).to_bytes(4, "little")

    def read(self) -> DeviceNote:
        """What it says; nothing before the first write, and amid one."""
        length, checksum = (int.from_bytes(self._memory[at : at + 4], "little") for at in (0, 4))
        said = bytes(self._memory[_HEAD : _HEAD + min(length, NOTE_BYTES - _HEAD)])
        if not length or zlib.crc32(said) != checksum:
            return NOTHING
        return _decoder.decode(said)


def _cut(text: str) -> str:
    return text.encode()[:MOST_BYTES].decode(errors="ignore")
