"""The writing end of a local queue: many readers that join, leave, die or lag while it writes.

Only a *live* reader that does not read can make `enqueue` wait, until its deadline, and the error names it. A reader
whose process is dying is dropped as soon as it is in the way, without a wait for the kernel to close its sockets.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec

from membership.base.errors import QueueClosed, QueueError, QueueTimeout, WaitTimeout
from membership.base.process_stats import is_dying
from membership.base.timing import ENQUEUE_TIMEOUT_S
from workers.ipc.doorbell import Bell, Doorbell
from workers.ipc.futex import sem_post
from workers.ipc.handover import Grant, Handover, HandoverRefused, Link
from workers.queue.arena import ARENA_BYTES, ArenaWriter, Extent, layout, pack
from workers.queue.codec import Codec
from workers.queue.handle import Handle, Join, Joined, this_host
from workers.queue.ring import RING_BYTES, SLOTS, RingWriter

RAW, PLAIN, PARTS, FAR_RAW, FAR = range(5)
"""Kinds of record: `bytes` as they are; an encoded message; a size table, an encoded message and its buffers; the
place in the arena of `bytes`; the place in the arena of an encoded message and its buffers."""
LOOK_S = 0.001  # while waiting for room, look this often whether the readers in the way are alive
STOP_TIMEOUT_S = 5.0
T = TypeVar("T")


class SlowReaders(QueueTimeout):
    """Live readers left no room before the deadline. The message went to no reader."""

    def __init__(self, message: str, readers: Sequence[str]) -> None:
        super().__init__(message, hint="drop_reader() the ones that are not coming back")
        self.readers = tuple(readers)


@dataclass(frozen=True, eq=False)
class _Reader:
    id: str
    slot: int
    link: Link
    bell: Bell


class QueueWriter:
    """See MessageQueue. Any thread may enqueue."""

    def __init__(
        self,
        name: str,
        codec: Codec,
        *,
        ring_bytes: int = RING_BYTES,
        arena_bytes: int = ARENA_BYTES,
        on_reader_gone: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self.codec = codec
        self._encode = codec.encode
        self._raw = codec.raw_bytes
        self._on_reader_gone = on_reader_gone
        self._patience = threading.RLock()  # held by the one thread that waits for room or fills an extent
        self._lock = threading.Lock()  # guards what follows; only ever held for microseconds
        self._changed = threading.Condition(self._lock)
        self._readers: dict[str, _Reader] = {}
        self._leaving: set[_Reader] = set()  # dropped, but their processes may still touch their slots
        self._free_slots = list(range(SLOTS - 1, -1, -1))
        self._bells: tuple[int, ...] = ()
        self._closed = False
        self.elsewhere: Callable[[], Iterable[str]] = tuple  # ids of readers on other hosts
        self._queue = f"queue/{name}/{secrets.token_hex(16)}"
        with ExitStack() as opened:
            self._ring = RingWriter(ring_bytes)
            opened.callback(self._ring.segment.close)
            self._inline_max = self._ring.inline_max
            self._arena = ArenaWriter(self._ring.held, arena_bytes)
            opened.callback(self._arena.segment.close)
            self._room = opened.enter_context(Doorbell(spin_us=0))
            self._handover = Handover.default()
            self._handover.serve(self._queue, self._join)
            opened.pop_all()

    def handle(self) -> Handle:
        """How to join from this host."""
        return Handle(self._queue, self.codec.name, this_host(), self._handover.address)

    @property
    def readers(self) -> tuple[str, ...]:
        """Ids of those that have joined and are neither gone nor dropped."""
        with self._lock:
            return tuple(self._readers)

    def enqueue(self, message: Any, timeout_s: float = ENQUEUE_TIMEOUT_S) -> int:
        """See MessageQueue."""
        buffers: Sequence[memoryview] = ()
        if self._raw and type(message) is bytes:
            kind, body = RAW, message
        else:
            kind = PLAIN
            body, buffers = self._encode(message)
        if buffers or len(body) > self._inline_max:
            return self._send_parts(kind, [memoryview(body), *buffers], time.monotonic() + timeout_s)
        with self._lock:  # as `_put`, but in as few steps as can be
            if self._closed:
                self._check_open()
            if self._ring.put(kind, body):
                for bell in self._bells:
                    sem_post(bell)
                return len(self._bells)
        return self._send(kind, body, time.monotonic() + timeout_s)

    def _send_parts(self, kind: int, parts: Sequence[memoryview], deadline: float) -> int:
        _, nbytes = layout(part.nbytes for part in parts)
        if nbytes + 8 * len(parts) + 8 <= self._inline_max:
            return self._send(PARTS, pack(parts), deadline)
        with self._patient(deadline):
            extent = self._until(
                lambda: self._arena.allocate(nbytes, self._slots()),
                self._arena.holders,
                lambda: self._closed,
                deadline,
                "still hold messages",
            )
            try:
                body = self._arena.fill(extent, parts)
                return self._send(FAR_RAW if kind == RAW else FAR, body, deadline, extent)
            except QueueError:
                self._arena.cancel(extent)
                raise

    def _send(self, kind: int, body: bytes, deadline: float, extent: Extent | None = None) -> int:
        count = self._put(kind, body, extent)
        if count is not None:
            return count
        nbytes = len(body)
        with self._patient(deadline):
            self._ring.want_room(nbytes)
            try:
                return self._until(
                    lambda: self._put(kind, body, extent),
                    lambda: self._ring.laggards(nbytes),
                    lambda: self._closed or self._ring.fits(nbytes),
                    deadline,
                    "do not read",
                )
            finally:
                if not self._closed:
                    self._ring.have_room()

    def _put(self, kind: int, body: bytes, extent: Extent | None) -> int | None:
        """To how many readers it went; None if the ring is full."""
        with self._lock:
            self._check_open()
            if not self._ring.fits(len(body)):
                return None
            if extent is not None:
                self._arena.hold(extent, [reader.slot for reader in self._readers.values()])
            self._ring.put(kind, body)
            for bell in self._bells:
                sem_post(bell)
            return len(self._bells)

    @contextmanager
    def _patient(self, deadline: float) -> Iterator[None]:
        if not self._patience.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise QueueTimeout(f"queue {self.name}: another message is still waiting for room")
        try:
            yield
        finally:
            self._patience.release()

    def _until(
        self,
        attempt: Callable[[], T | None],
        blockers: Callable[[], Iterable[int]],
        ready: Callable[[], bool],
        deadline: float,
        why: str,
    ) -> T:
        """Repeat `attempt` until it succeeds; meanwhile get rid of blockers (slots) that are dying."""
        while True:
            result = attempt()
            if result is not None:
                return result
            with self._lock:
                self._check_open()
                slots = set(blockers())
                slow = [reader for reader in self._readers.values() if reader.slot in slots]
            dying = [reader for reader in slow if is_dying(reader.link.peer_pid)]
            for reader in dying:
                self._drop(reader)
            left = deadline - time.monotonic()
            if left <= 0 and slow and not dying:
                names = ", ".join(f"{reader.id} (pid {reader.link.peer_pid})" for reader in slow)
                raise SlowReaders(f"queue {self.name}: no room, readers {why}: {names}", [r.id for r in slow])
            if not dying:
                self._room.wait(ready, min(LOOK_S, max(left, 0.0)))

    def wait_until_ready(self, readers: Iterable[str], timeout_s: float) -> None:
        """Wait until all these have joined; WaitTimeout names the missing."""
        wanted = set(readers)
        with self._changed:
            if self._changed.wait_for(lambda: self._closed or not self._missing(wanted), timeout_s):
                return self._check_open()
            missing = ", ".join(sorted(self._missing(wanted)))
        raise WaitTimeout(f"queue {self.name}: not joined within {timeout_s} s: {missing}")

    def look_again(self) -> None:
        """Readers elsewhere have changed."""
        with self._changed:
            self._changed.notify_all()

    def _missing(self, wanted: set[str]) -> set[str]:
        return wanted - self._readers.keys() - set(self.elsewhere())

    def drop_reader(self, reader_id: str) -> bool:
        """Never wait for this reader again, and end its link; False if it had not joined. Its id may join again."""
        with self._lock:
            reader = self._readers.get(reader_id)
        if reader is None:
            return False
        self._drop(reader)
        return True

    def shutdown(self) -> None:
        """End the queue: readers get what is in the ring, then QueueClosed. Idempotent, from any thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            self._room.ring()
        self._handover.withdraw(self._queue)
        if not self._patience.acquire(timeout=STOP_TIMEOUT_S):
            raise WaitTimeout(f"queue {self.name}: an enqueue did not end within {STOP_TIMEOUT_S} s of shutdown")
        try:
            with self._lock:
                for reader in {*self._readers.values(), *self._leaving}:
                    reader.link.close()
                    reader.bell.close()
                self._readers.clear()
                self._leaving.clear()
                self._bells = ()
                self._arena.segment.close()
                self._ring.segment.close()
                self._room.close()
        finally:
            self._patience.release()

    # ---- membership: join and gone run in the handover's thread

    def _join(self, link: Link, request: bytes, fds: list[int]) -> Grant:
        try:
            join = msgspec.msgpack.decode(request, type=Join)
        except msgspec.MsgspecError as error:
            raise HandoverRefused(f"not a join request: {error}") from error
        if join.codec != self.codec.name:
            raise HandoverRefused(f"reader {join.reader_id} speaks {join.codec}, this queue {self.codec.name}")
        with self._lock:
            self._check_open()
            before = self._readers.get(join.reader_id)
            if before is not None and not before.link.peer_closed():
                raise HandoverRefused(f"reader {join.reader_id} has joined already (pid {before.link.peer_pid})")
            if not self._free_slots:
                raise HandoverRefused(f"queue {self.name} has no room for more than {SLOTS} readers")
            if before is not None:
                self._expel(before)
            reader = _Reader(join.reader_id, self._free_slots.pop(), link, Bell.attach(fds[0]))
            start = self._ring.admit(reader.slot)
            self._readers[reader.id] = reader
            self._bells = (*self._bells, reader.bell.address)
            self._changed.notify_all()
            joined = Joined(reader.slot, start, self._ring.capacity, self._arena.segment.size)
            files = (self._ring.segment.fileno(), self._arena.segment.fileno(), self._room.fileno())
        return Grant(msgspec.msgpack.encode(joined), files, on_gone=partial(self._gone, reader))

    def _gone(self, reader: _Reader, _: Link) -> None:
        with self._lock:
            if self._closed:
                return
            self._expel(reader)
            self._leaving.discard(reader)
            self._arena.forget(reader.slot)
            self._free_slots.append(reader.slot)
            reader.bell.close()
            self._room.ring()
        if self._on_reader_gone is not None:
            self._on_reader_gone(reader.id)

    def _drop(self, reader: _Reader) -> None:
        with self._lock:
            self._expel(reader)
        reader.link.dismiss()

    def _expel(self, reader: _Reader) -> None:
        if self._readers.get(reader.id) is not reader:
            return
        del self._readers[reader.id]
        self._leaving.add(reader)
        self._ring.expel(reader.slot)
        self._bells = tuple(bell for bell in self._bells if bell != reader.bell.address)
        self._changed.notify_all()

    def _slots(self) -> list[int]:
        with self._lock:
            return [reader.slot for reader in self._readers.values()]

    def _check_open(self) -> None:
        if self._closed:
            raise QueueClosed(f"queue {self.name} is shut down")
