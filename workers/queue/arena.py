"""Messages that are too large for the ring: one sparse arena per queue, read in place by all readers.

The arena takes memory only where messages have been. An extent is free again when no reader has a view of it: each
reader notes that in its byte of the extent's row (`held`). Python itself counts the views.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from membership.base.errors import MessageTooLarge
from workers.ipc.shared_memory import PAGE, Segment
from workers.queue.ring import EXTENTS, SLOTS

ARENA_BYTES = 1 << 30  # virtual; memory is taken as needed
KEEP_BYTES = 64 << 20  # memory kept for the next messages while nothing is in flight
ALIGN = 64  # of each buffer: what vector loads like
_PLACE = struct.Struct("<2Q")


class Extent(NamedTuple):
    """A piece of the arena."""

    number: int
    offset: int
    nbytes: int


def layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Offsets of buffers of these sizes laid one after the other, and the total."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += (size + ALIGN - 1) & -ALIGN
    return offsets, end


def pack_sizes(parts: Sequence[memoryview]) -> bytes:
    """A table of the parts' sizes, as `unpack_sizes` reads it."""
    return struct.pack(f"<{len(parts) + 1}Q", len(parts), *(part.nbytes for part in parts))


def unpack_sizes(table: bytes, offset: int = 0) -> tuple[tuple[int, ...], int]:
    """The sizes and where the table ends."""
    (count,) = struct.unpack_from("<Q", table, offset)
    return struct.unpack_from(f"<{count}Q", table, offset + 8), offset + 8 + 8 * count


def pack(parts: Sequence[memoryview]) -> bytes:
    """All parts, with their sizes, as one record body."""
    body = bytearray(pack_sizes(parts))
    base = len(body)
    offsets, _ = layout(part.nbytes for part in parts)
    for part, offset in zip(parts, offsets, strict=True):
        body += bytes(base + offset - len(body))
        body += part
    return bytes(body)


def unpack(body: bytes) -> list[memoryview]:
    """The parts again; they keep `body` alive."""
    sizes, base = unpack_sizes(body)
    return _cut(memoryview(body), base, sizes)


def _cut(whole: memoryview, start: int, sizes: Sequence[int]) -> list[memoryview]:
    """The parts that `layout` laid out from `start` on."""
    parts = []
    for size in sizes:
        parts.append(whole[start : start + size])
        start += (size + ALIGN - 1) & -ALIGN
    return parts


class ArenaWriter:
    """Allocates extents, first fit, so that the same warm pages are used again. Not thread-safe: its owner locks."""

    def __init__(self, held: memoryview[int], nbytes: int = ARENA_BYTES) -> None:
        self.segment = Segment.create(nbytes, "elastic-ep-overflow")
        self._held = held
        self._live: list[Extent] = []  # by offset
        self._free_numbers = list(range(EXTENTS))
        self._reserved = 0  # bytes from the start that have memory

    def allocate(self, nbytes: int, slots: Iterable[int]) -> Extent | None:
        """An extent of `nbytes`, None while the readers in `slots` hold too much. SegmentError: no memory."""
        nbytes = -(-nbytes // PAGE) * PAGE
        if nbytes > self.segment.size:
            raise MessageTooLarge(f"message of {nbytes} bytes; this queue carries at most {self.segment.size}")
        self._reclaim(tuple(slots))
        if not self._free_numbers:
            return None
        offset = 0
        for live in self._live:
            if live.offset - offset >= nbytes:
                break
            offset = live.offset + live.nbytes
        if offset + nbytes > self.segment.size:
            return None
        if offset + nbytes > self._reserved:
            self.segment.reserve(self._reserved, offset + nbytes - self._reserved)
            self._reserved = offset + nbytes
        extent = Extent(self._free_numbers.pop(), offset, nbytes)
        self._live = sorted([*self._live, extent], key=lambda e: e.offset)
        return extent

    def fill(self, extent: Extent, parts: Sequence[memoryview]) -> bytes:
        """Copy the parts in; the record body by which readers find them."""
        offsets, _ = layout(part.nbytes for part in parts)
        for part, offset in zip(parts, offsets, strict=True):
            start = extent.offset + offset
            self.segment.map[start : start + part.nbytes] = part
        return _PLACE.pack(extent.number, extent.offset) + pack_sizes(parts)

    def hold(self, extent: Extent, slots: Iterable[int]) -> None:
        """These readers will look at it."""
        for slot in slots:
            self._held[extent.number * SLOTS + slot] = 1

    def cancel(self, extent: Extent) -> None:
        """The message was not sent after all."""
        self._live.remove(extent)
        self._free_numbers.append(extent.number)

    def forget(self, slot: int) -> None:
        """The reader in `slot` is gone for good: the slot may be given to another."""
        for number in range(EXTENTS):
            self._held[number * SLOTS + slot] = 0

    def holders(self) -> set[int]:
        """Slots of readers that hold something."""
        rows = {e.number: bytes(self._held[e.number * SLOTS : (e.number + 1) * SLOTS]) for e in self._live}
        return {slot for row in rows.values() for slot, byte in enumerate(row) if byte}

    def _reclaim(self, slots: tuple[int, ...]) -> None:
        for extent in list(self._live):
            row = bytes(self._held[extent.number * SLOTS : (extent.number + 1) * SLOTS])
            if not any(row) or not any(row[slot] for slot in slots):
                self.cancel(extent)
        if not self._live and self._reserved > KEEP_BYTES:
            self.segment.punch(KEEP_BYTES, self._reserved - KEEP_BYTES)
            self._reserved = KEEP_BYTES


class ArenaReader:
    """Looks at extents in place."""

    def __init__(self, segment: Segment, held: memoryview[int], slot: int) -> None:
        self.segment = segment
        self._held = held
        self._slot = slot
        self._whole = ctypes.c_char * segment.size  # one type for all messages: ctypes caches types for ever
        self._watched: dict[int, weakref.ref[Any]] = {}  # of each extent in use, what all its views keep alive
        self._closed = False

    def views(self, body: bytes) -> list[memoryview[int]]:
        """The parts of the message, in shared memory; the last view's end gives the extent back by itself."""
        number, offset = _PLACE.unpack_from(body)
        sizes, _ = unpack_sizes(body, _PLACE.size)
        holder = self._whole.from_buffer(self.segment.map)
        self._watched[number] = weakref.ref(holder, partial(self._release, number))
        return _cut(memoryview(holder).cast("B").toreadonly(), offset, sizes)

    def _release(self, number: int, _: weakref.ref[Any]) -> None:
        if not self._closed:
            self._held[number * SLOTS + self._slot] = 0

    def close(self) -> None:
        """Unmap, once no view is left; the writer may use the extents again from now on."""
        self._closed = True
        self.segment.close()
