"""MessageQueue: one writer, many readers that come and go; over shared memory on one host, ZeroMQ beyond it.

writer                                        reader (any process of this host)
queue = MessageQueue("steps")                 queue = MessageQueue.create_from_handle(handle, "rank 3#12", bell)
handle = queue.export_handle()                queue.dequeue(timeout_s=5)
queue.wait_until_ready(["rank 3#12"], 5)      # or, for many sources: bell.wait(lambda: a.pending() or b.pending())
queue.enqueue({"hello": array})
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from membership.base.errors import QueueError
from membership.base.timing import ENQUEUE_TIMEOUT_S
from workers.ipc.doorbell import Doorbell
from workers.queue.arena import ARENA_BYTES
from workers.queue.codec import Codec, MsgpackCodec, PickleCodec
from workers.queue.handle import CurveKeys, Handle, Remote, this_host
from workers.queue.reader import QueueReader
from workers.queue.ring import RING_BYTES
from workers.queue.writer import QueueWriter, SlowReaders

if TYPE_CHECKING:  # ZeroMQ is loaded only where it is used
    from workers.queue.remote_reader import RemoteReader
    from workers.queue.remote_writer import CrossHostWriter
    from workers.queue.silence import Acks, OtherHosts

__all__ = ["Codec", "CurveKeys", "Handle", "MessageQueue", "MsgpackCodec", "PickleCodec", "Remote", "SlowReaders"]

JOIN_TIMEOUT_S = 10.0


class MessageQueue:
    """One end of a queue. Constructing it makes the writing end, `create_from_handle` a reading end.

    A method of the other end raises QueueError. What each end does is `writer.py` and `reader.py` on one host,
    `remote_writer.py` and `remote_reader.py` beyond it.
    """

    def __init__(
        self,
        name: str,
        codec: Codec | None = None,
        *,
        ring_bytes: int = RING_BYTES,
        arena_bytes: int = ARENA_BYTES,
        on_reader_gone: Callable[[str], None] | None = None,
        remote: Remote | None = None,
    ) -> None:
        """`on_reader_gone(reader_id)` runs in the handover's thread: be quick. `remote`: serve other hosts too."""
        writer = QueueWriter(
            name, codec or PickleCodec(), ring_bytes=ring_bytes, arena_bytes=arena_bytes, on_reader_gone=on_reader_gone
        )
        if remote is None:
            self._write_to(writer)
        else:
            from workers.queue.remote_writer import CrossHostWriter

            self._write_to(CrossHostWriter(writer, remote))

    @classmethod
    def create_from_handle(
        cls,
        handle: Handle | bytes,
        reader_id: str,
        doorbell: Doorbell | None = None,
        timeout_s: float = JOIN_TIMEOUT_S,
        codec: Codec | None = None,
        keys: CurveKeys | None = None,
    ) -> MessageQueue:
        """Join as `reader_id` (unique among readers); sees every message enqueued from now on.

        `doorbell` is the one this thread waits on for all its sources; without it the queue has its own. `codec` must
        match the writer's; it can be left out for pickle. `keys` are needed if the writer is on another host.
        """
        handle = Handle.decode(handle) if isinstance(handle, bytes) else handle
        codec = codec or (PickleCodec() if handle.codec == PickleCodec.name else MsgpackCodec())
        queue = cls.__new__(cls)
        reader: QueueReader | RemoteReader
        if handle.host == this_host():
            reader = QueueReader(handle, reader_id, codec, doorbell, timeout_s)
        elif handle.remote and keys is not None:
            from workers.queue.remote_reader import RemoteReader

            reader = RemoteReader(handle, reader_id, codec, doorbell, timeout_s, keys)
        else:
            raise QueueError(
                f"queue {handle.queue}: its writer is on another host, and "
                + ("we run without --advertise" if handle.remote else "runs without --advertise"),
                hint="start the roles on both hosts with --advertise and the same join secret",
            )
        queue._read_from(reader)
        return queue

    def _write_to(self, writer: QueueWriter | CrossHostWriter) -> None:
        self._end: QueueWriter | CrossHostWriter | QueueReader | RemoteReader = writer
        self._writing: QueueWriter | CrossHostWriter | None = writer
        self._reading: QueueReader | RemoteReader | None = None
        self._shortcut("enqueue")

    def _read_from(self, reader: QueueReader | RemoteReader) -> None:
        self._end, self._writing, self._reading = reader, None, reader
        self._shortcut("dequeue", "try_dequeue", "pending")

    def _shortcut(self, *methods: str) -> None:
        """Have calls on this object reach its end's methods directly: a frame between costs 8% of a round trip."""
        self.__dict__.update({name: getattr(self._end, name) for name in methods})

    def enqueue(self, message: Any, timeout_s: float = ENQUEUE_TIMEOUT_S) -> int:
        """Writing end: send to all readers; returns to how many.

        Dead readers are skipped. SlowReaders (a QueueTimeout) names the live ones that left no room until the deadline;
        then the message reached no reader.
        """
        return self._writer.enqueue(message, timeout_s)

    def dequeue(self, timeout_s: float) -> Any:
        """Reading end: the next message. QueueTimeout at the deadline; QueueClosed once the writer is gone and all is
        read.

        Arrays and tensors may be in shared memory that all readers see. Never write to them, copy what must outlive
        this queue, and drop them soon: until then the writer cannot reuse their memory.
        """
        return self._reader.dequeue(timeout_s)

    def try_dequeue(self) -> Any:
        """Reading end: the next message, or None if there is none now (so never send None). QueueClosed as above."""
        return self._reader.try_dequeue()

    def pending(self) -> bool:
        """Reading end: whether `try_dequeue` would return or raise something. Cheap, for Doorbell.wait."""
        return self._reader.pending()

    def watch(self, on_arrival: Callable[[Any], None]) -> None:
        """Reading end on another host: give each message to `on_arrival` as it arrives, in the socket's thread.

        Those that have arrived are given at once, in this thread. All are dequeued as ever.
        """
        if isinstance(self._reader, QueueReader):
            raise QueueError(f"queue {self.name}: its writer is on this host")
        self._reader.watch(on_arrival)

    def end_on_silence(self, others: OtherHosts) -> None:
        """Reading end on another host: the queue ends (QueueSilent) as soon as the writer's host is suspected, and not
        only after REMOTE_SILENCE_S. That is left if all `others` are silent, too.
        """
        if not isinstance(self._reader, QueueReader):
            self._reader.end_on_silence(others)

    @property
    def acks(self) -> Acks | None:
        """Reading end on another host, once it ends on silence: what the kernel knows of the connection."""
        return None if isinstance(self._reader, QueueReader) else self._reader.acks

    def export_handle(self) -> Handle:
        """Writing end: plain data by which readers join; put `.encode()` into records."""
        return self._writer.handle()

    def wait_until_ready(self, readers: Iterable[str] = (), timeout_s: float = JOIN_TIMEOUT_S) -> None:
        """Writing end: wait until these readers have joined; WaitTimeout names the missing. A reading end is ready."""
        if self._writing is not None:
            self._writing.wait_until_ready(readers, timeout_s)

    @property
    def readers(self) -> tuple[str, ...]:
        """Writing end: ids of the readers right now."""
        return self._writer.readers

    def drop_reader(self, reader_id: str) -> bool:
        """Writing end: never wait for this reader again (a masked or hung rank); it finds its end closed.

        False if it was not in.
        """
        return self._writer.drop_reader(reader_id)

    @property
    def name(self) -> str:
        """For logs."""
        return self._end.name

    def shutdown(self) -> None:
        """Close this end: the other notices. Idempotent, from any thread except in a signal handler."""
        self._end.shutdown()

    def __enter__(self) -> MessageQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @property
    def _writer(self) -> QueueWriter | CrossHostWriter:
        if self._writing is None:
            raise QueueError(f"queue {self.name}: this is the reading end")
        return self._writing

    @property
    def _reader(self) -> QueueReader | RemoteReader:
        if self._reading is None:
            raise QueueError(f"queue {self.name}: this is the writing end")
        return self._reading
