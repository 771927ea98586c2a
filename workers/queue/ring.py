"""The memory of a local queue: one writer's ring of records, and one line per reader that says how far it has read.

Positions only grow; `head` is where the writer will write next, a reader's `tail` where it will read next. The writer
stores a record first and `head` afterwards, a reader copies the record first and stores `tail` afterwards; x86-64 keeps
both orders. Nothing here waits, wakes, or knows the readers' processes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

from membership.base.errors import ConfigError, QueueClosed
from membership.store.records import MAX_RANKS
from workers.ipc.shared_memory import Segment

SLOTS = 2 * MAX_RANKS  # readers at once, including those dropped that have not let go yet
EXTENTS = 64  # overflow messages in flight
RING_BYTES = 256 * 1024
INLINE_MAX = 64 * 1024  # larger messages go to the overflow arena; at most a quarter of the ring
NEVER = 2**64 - 1

_LINE = 64  # bytes: each word that one process writes and others read has a cache line of its own
_HEAD, _WANT = 0, 8  # word indexes
_SLOT0 = 16  # word index of slot 0: [tail, active]
_SLOT_WORDS = _LINE // 8
_HELD0 = _SLOT0 * 8 + SLOTS * _LINE  # byte offset: one byte per (extent, slot), 1 while that reader may look at it
_RING0 = _HELD0 + EXTENTS * SLOTS
_PAD = 0xFF  # record kind: nothing here, go on at the ring's start


def places(memory: memoryview) -> tuple[int, dict[int, int]]:
    """Where the writer of a ring is, and each reader, by its slot: for a look at its memory from outside."""
    words = memory[:_RING0].cast("Q")
    tails = {slot: _SLOT0 + slot * _SLOT_WORDS for slot in range(SLOTS)}
    return words[_HEAD], {slot: words[word] for slot, word in tails.items() if words[word + 1]}


class RingWriter:
    """Creates the memory and writes. Not thread-safe: its owner locks."""

    def __init__(self, ring_bytes: int = RING_BYTES) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise ConfigError(
                f"the shared-memory queue relies on x86-64's store order; this is {platform.machine()}",
                hint="use remote (ZeroMQ) queues on this machine",
            )
        if ring_bytes & (ring_bytes - 1) or ring_bytes < 4096:
            raise ConfigError(f"ring_bytes must be a power of two >= 4096, not {ring_bytes}")
        self.capacity = ring_bytes
        self.inline_max = min(INLINE_MAX, ring_bytes // 4)
        self.segment = Segment.create(_RING0 + ring_bytes, "elastic-ep-queue")
        try:
            self.segment.reserve(0, self.segment.size)
        except BaseException:
            self.segment.close()
            raise
        self._words = self.segment.view(0, _RING0 + ring_bytes, "Q")
        self.held = self.segment.view(_HELD0, EXTENTS * SLOTS)
        self._memory = self.segment.map
        self._head = 0
        self._limit = ring_bytes  # positions below it may be written without looking at the tails again
        self._tails: tuple[int, ...] = ()  # word indexes of the active readers' tails
        self._words[_WANT] = NEVER

    def admit(self, slot: int) -> int:
        """Let the reader in `slot` see everything from now on; the position it starts at."""
        word = _SLOT0 + slot * _SLOT_WORDS
        self._words[word] = self._head
        self._words[word + 1] = 1
        self._tails = (*self._tails, word)
        return self._head

    def expel(self, slot: int) -> None:
        """Forget the reader in `slot`: what it has not read may be overwritten from now on, and it can see that."""
        word = _SLOT0 + slot * _SLOT_WORDS
        self._words[word + 1] = 0
        self._tails = tuple(w for w in self._tails if w != word)

    def put(self, kind: int, body: bytes) -> bool:
        """Append a record; False (and nothing changed) if the slowest reader leaves no room."""
        # As few steps as can be: after a pause each costs a microsecond, since nothing of it is in the caches.
        nbytes = len(body)
        head = self._head
        at = head & (self.capacity - 1)
        if at + nbytes + 8 > self.capacity:
            end = head + self.capacity - at + ((nbytes + 15) & ~7)
            if end > self._limit and not self._fits(end):
                return False
            self._words[(_RING0 + at) >> 3] = _PAD
            at = _RING0
        else:
            end = head + ((nbytes + 15) & ~7)
            if end > self._limit and not self._fits(end):
                return False
            at += _RING0
        self._words[at >> 3] = nbytes << 8 | kind
        self._memory[at + 8 : at + 8 + nbytes] = body
        self._head = self._words[_HEAD] = end
        return True

    def fits(self, nbytes: int) -> bool:
        """Whether a record of `nbytes` has room now."""
        return self._fits(self._end(nbytes))

    def laggards(self, nbytes: int) -> list[int]:
        """Slots of the readers that leave no room for a record of `nbytes`."""
        least = self._end(nbytes) - self.capacity
        return [(w - _SLOT0) // _SLOT_WORDS for w in self._tails if self._words[w] < least]

    def _end(self, nbytes: int) -> int:
        """Where the head will be after a record of `nbytes`; one that would cross the ring's end starts a new lap."""
        at = self._head & (self.capacity - 1)
        gap = self.capacity - at if at + nbytes + 8 > self.capacity else 0
        return self._head + gap + ((nbytes + 15) & ~7)

    def _fits(self, end: int) -> bool:
        words = self._words
        self._limit = min([words[w] for w in self._tails], default=self._head) + self.capacity
        return end <= self._limit

    def want_room(self, nbytes: int) -> None:
        """Ask readers to ring once there is room for `nbytes` and a quarter of the ring (each record: slow)."""
        self._words[_WANT] = max(self._end(nbytes) - self.capacity, self._head - self.capacity * 3 // 4, 1)

    def have_room(self) -> None:
        """Take that back."""
        self._words[_WANT] = NEVER


class RingReader:
    """Reads from its own slot of the memory that a writer made. For one thread."""

    def __init__(self, segment: Segment, slot: int, start: int, capacity: int, room_made: Callable[[], None]) -> None:
        """`room_made` is called when the writer waits for room."""
        self.segment = segment
        self.slot = slot
        self.held = segment.view(_HELD0, EXTENTS * SLOTS)
        self.ended = False  # set by the owner: nothing more will come
        self._mask = capacity - 1
        self._words = segment.view(0, _RING0 + capacity, "Q")
        self._memory = segment.map
        self._tail = start
        self._word = _SLOT0 + slot * _SLOT_WORDS
        self._room_made = room_made

    def pending(self) -> bool:
        """Whether a record is there, or the end."""
        return self.ended or self._words[_HEAD] != self._tail

    def take(self) -> tuple[int, bytes] | None:
        """Kind and body of the next record, copied out, if there is one."""
        words = self._words
        tail = self._tail
        if words[_HEAD] == tail:
            return None
        at = _RING0 + (tail & self._mask)
        word = words[at >> 3]
        if word == _PAD:
            tail += _RING0 + self._mask + 1 - at
            at = _RING0
            word = words[at >> 3]
        nbytes = word >> 8
        body = self._memory[at + 8 : at + 8 + nbytes]
        if not words[self._word + 1]:  # read after the copy: while it is set, nothing unread is overwritten
            raise QueueClosed("the writer has dropped this reader")
        self._tail = words[self._word] = tail = tail + ((nbytes + 15) & ~7)
        if tail >= words[_WANT]:
            self._room_made()
        return word & 0xFF, body
