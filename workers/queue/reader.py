"""The reading end of a local queue. Joining is one question to the writer's process."""

from __future__ import annotations

import threading
from typing import Any

import msgspec

from membership.base.errors import QueueClosed, QueueTimeout, WaitTimeout
from workers.ipc.doorbell import Bell, Doorbell
from workers.ipc.handover import Handover, Link
from workers.ipc.shared_memory import Segment
from workers.queue.arena import ArenaReader, unpack
from workers.queue.codec import Codec
from workers.queue.handle import Handle, Join, Joined
from workers.queue.ring import RingReader
from workers.queue.writer import FAR_RAW, PARTS, PLAIN, RAW, STOP_TIMEOUT_S

_NOTHING = object()


class QueueReader:
    """See MessageQueue. One thread at a time reads."""

    def __init__(self, handle: Handle, reader_id: str, codec: Codec, doorbell: Doorbell | None, timeout_s: float):
        self.name = f"{handle.queue.split('/')[1]} (reader {reader_id})"
        self.codec = codec
        self._decode = codec.decode
        self._own_bell = doorbell is None
        self._bell = Doorbell() if doorbell is None else doorbell
        self._gone = self._mapped = False  # gone: the writer is, or it dropped us
        self._closed = False
        self._reading = threading.Lock()
        self._ending = threading.Lock()  # the handover's thread rings the bell: not after it is closed
        try:
            self._link = Handover.default().connect(
                handle.address,
                handle.queue,
                msgspec.msgpack.encode(Join(reader_id, codec.name)),
                [self._bell.fileno()],
                timeout_s=timeout_s,
                on_gone=self._writer_gone,
            )
        except BaseException:
            self._close_bell()
            raise
        try:
            self._map(msgspec.msgpack.decode(self._link.reply, type=Joined))
        except BaseException:
            self._link.close()
            self._close_bell()
            raise

    def _map(self, joined: Joined) -> None:
        ring, arena, room = self._link.reply_fds
        self._room = Bell.attach(room)
        self._ring = RingReader(
            Segment.attach(ring), joined.slot, joined.start, joined.ring_bytes, room_made=self._room.ring
        )
        self._arena = ArenaReader(Segment.attach(arena, joined.arena_bytes), self._ring.held, joined.slot)
        self._link.release_fds()
        self.pending = self._ring.pending  # whether `try_dequeue` has something to say: a message, or the end
        with self._ending:
            self._mapped = True
            self._ring.ended = self._gone

    def try_dequeue(self) -> Any:
        """The next message, or None if there is none now. QueueClosed once the writer is gone and all is read."""
        with self._reading:
            message = self._next()
        return None if message is _NOTHING else message

    def dequeue(self, timeout_s: float) -> Any:
        """The next message. QueueTimeout at the deadline; QueueClosed once the writer is gone and all is read."""
        with self._reading:
            message = self._next()
            if message is not _NOTHING:
                return message
            while self._bell.wait_for_ring(self.pending, timeout_s):
                message = self._next()
                if message is not _NOTHING:
                    return message
        raise QueueTimeout(f"queue {self.name}: no message from pid {self._link.peer_pid} within {timeout_s} s")

    def _next(self) -> Any:
        gone = self._gone  # before the look: a writer that is gone by then has written all it ever will
        if self._closed:
            raise QueueClosed(f"queue {self.name} is shut down")
        record = self._ring.take()
        if record is None:
            if gone:
                raise QueueClosed(f"queue {self.name}: its writer (pid {self._link.peer_pid}) is gone")
            return _NOTHING
        kind, body = record
        if kind == RAW:
            return body
        if kind == PLAIN:
            return self._decode(body, ())
        parts = unpack(body) if kind == PARTS else self._arena.views(body)
        return bytes(parts[0]) if kind == FAR_RAW else self._decode(parts[0], parts[1:])

    def shutdown(self) -> None:
        """Leave. Idempotent, from any thread; a dequeue in another thread ends with QueueClosed.

        Arrays read in place stay mapped, but their memory may be used for other messages from now on.
        """
        with self._ending:
            if self._closed:
                return
            self._closed = self._gone = self._ring.ended = True
            self._bell.ring()
        if not self._reading.acquire(timeout=STOP_TIMEOUT_S):
            raise WaitTimeout(f"queue {self.name}: a dequeue did not end within {STOP_TIMEOUT_S} s of shutdown")
        try:
            self._link.close()
            self._room.close()
            self._arena.close()
            self._ring.segment.close()
            self._close_bell()
        finally:
            self._reading.release()

    def _writer_gone(self, _: Link) -> None:
        with self._ending:
            self._gone = True
            if self._mapped and not self._closed:
                self._ring.ended = True
                self._bell.ring()

    def _close_bell(self) -> None:
        if self._own_bell:
            self._bell.close()
