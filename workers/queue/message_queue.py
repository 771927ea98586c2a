"""MessageQueue: one writer, many readers that come and go; over shared memory on one host, ZeroMQ beyond it.

writer                                        reader (any process of this host)
queue = MessageQueue("steps")                 queue = MessageQueue.create_from_handle(handle, "rank 3#12", bell)
handle = queue.export_handle()                queue.dequeue(timeout_s=5)
queue.wait_until_ready(["rank 3#12"], 5)      # or, for many sources: bell.wait(lambda: a.pending() or b.pending())
queue.enqueue({"hello": array})
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import msgspec

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
    from workers.queue.remote_writer import RemoteWriter

__all__ = ["Codec", "CurveKeys", "Handle", "MessageQueue", "MsgpackCodec", "PickleCodec", "Remote", "SlowReaders"]

JOIN_TIMEOUT_S = 10.0


class Enqueue(Protocol):
    """The type of MessageQueue.enqueue."""

    def __call__(self, message: Any, timeout_s: float = ENQUEUE_TIMEOUT_S) -> int: ...


class MessageQueue:
    """One end of a queue. Constructing it makes the writing end, `create_from_handle` a reading end.

    What is done for each message is bound when the end is made, since every call between costs:

    * `enqueue(message, timeout_s)`: send to all readers; to how many. Dead readers are skipped; SlowReaders (a
      QueueTimeout) names live ones that left no room until the deadline, in which case nobody got it.
    * `dequeue(timeout_s)`: the next message. QueueTimeout at the deadline; QueueClosed once the writer is gone and all
      is read. Arrays and tensors may lie in shared memory that all readers see: never write to them, copy what shall
      outlive this queue, and let go of them soon, since the writer cannot use their memory again before.
    * `try_dequeue()`: the next message, or None if there is none now (so do not send None). QueueClosed as above.
    * `pending()`: whether `try_dequeue` would return or raise something; cheap, for Doorbell.wait.
    """

    enqueue: Enqueue
    dequeue: Callable[[float], Any]
    try_dequeue: Callable[[], Any]
    pending: Callable[[], bool]

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
            name,
            codec or PickleCodec(),
            ring_bytes=ring_bytes,
            arena_bytes=arena_bytes,
            on_reader_gone=on_reader_gone,
        )
        self._end: QueueWriter | QueueReader | RemoteReader = writer
        self._remote: RemoteWriter | None = None
        self.enqueue = writer.enqueue
        if remote is not None:
            self._serve_other_hosts(writer, remote)
        self.dequeue = self.try_dequeue = self.pending = self._not_a_reader

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
                f"queue {handle.queue}: its writer is on another host" + (" and we have no keys" * bool(handle.remote)),
                hint="give the writer `remote` and the reader `keys`",
            )
        queue._end, queue._remote = reader, None
        queue.enqueue = queue._not_a_writer
        queue.dequeue, queue.try_dequeue, queue.pending = reader.dequeue, reader.try_dequeue, reader.pending
        return queue

    def export_handle(self) -> Handle:
        """Writing end: plain data by which readers join; put `.encode()` into records."""
        handle = self._writer.handle()
        if self._remote is None:
            return handle
        return msgspec.structs.replace(handle, remote=self._remote.address, remote_key=self._remote.public_key)

    def wait_until_ready(self, readers: Iterable[str] = (), timeout_s: float = JOIN_TIMEOUT_S) -> None:
        """Writing end: wait until these readers have joined; WaitTimeout names who is missing. A reader is ready."""
        if isinstance(self._end, QueueWriter):
            self._end.wait_until_ready(readers, timeout_s)

    @property
    def readers(self) -> tuple[str, ...]:
        """Writing end: ids of the readers right now."""
        return (*self._writer.readers, *self._writer.elsewhere())

    def drop_reader(self, reader_id: str) -> bool:
        """Writing end: never wait for this reader again (a masked or hung rank); it finds its end closed.

        False if it was not in.
        """
        return self._writer.drop_reader(reader_id) or (self._remote is not None and self._remote.drop(reader_id))

    @property
    def name(self) -> str:
        """For logs."""
        return self._end.name

    def shutdown(self) -> None:
        """Close this end: the other notices. Idempotent, from any thread except in a signal handler."""
        self._end.shutdown()
        if self._remote is not None:
            self._remote.close()

    def _serve_other_hosts(self, writer: QueueWriter, remote: Remote) -> None:
        if not isinstance(writer.codec, MsgpackCodec):
            writer.shutdown()
            raise QueueError(f"queue {writer.name}: only msgpack crosses the network, not {writer.codec.name}")
        from workers.queue.remote_writer import RemoteWriter

        there = self._remote = RemoteWriter(writer.handle().queue, remote, on_change=writer.look_again)
        writer.elsewhere = there.readers

        def enqueue(message: Any, timeout_s: float = ENQUEUE_TIMEOUT_S) -> int:
            data, _ = writer.codec.encode(message)
            with there.sending(timeout_s) as send:
                return writer.enqueue(message, timeout_s) + send(data)

        self.enqueue = enqueue

    def __enter__(self) -> MessageQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.shutdown()

    @property
    def _writer(self) -> QueueWriter:
        if not isinstance(self._end, QueueWriter):
            self._not_a_writer()
        return self._end

    def _not_a_writer(self, *_: Any, **__: Any) -> NoReturn:
        raise QueueError(f"queue {self.name}: this is the reading end")

    def _not_a_reader(self, *_: Any, **__: Any) -> NoReturn:
        raise QueueError(f"queue {self.name}: this is the writing end")
