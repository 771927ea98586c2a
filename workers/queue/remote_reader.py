"""The reading end of a queue on another host; see remote_writer.py."""

from __future__ import annotations

import errno
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import msgspec
import structlog
import zmq
from zmq.utils.monitor import recv_monitor_message

from membership.base.errors import QueueClosed, QueueSilent, QueueTimeout, WaitTimeout
from membership.base.timing import REMOTE_SILENCE_S
from workers.ipc.doorbell import Doorbell
from workers.ipc.handover import HandoverRefused
from workers.queue.codec import Codec, MsgpackCodec
from workers.queue.curve import use_curve
from workers.queue.data_port import CAN_SEAL, TakeUp
from workers.queue.endpoints import connect
from workers.queue.handle import CurveKeys, Handle
from workers.queue.remote_wire import END, HEARTBEAT_S, SocketThread, ToReader, ToWriter
from workers.queue.sealed import SealedSocket
from workers.queue.silence import LOOK_S, Acks, Connection, OtherHosts, beat

PROBE_S = 0.2
LEAVE_S = 0.2  # at an end: for our leave to reach a writer that is there; one that is not forgets us by our silence
ASK_S, ASK_MAX_S = 2.0, 120.0  # between two attempts at a data connection: twice as long after each that failed
ACK_MESSAGES, ACK_BYTES = 256, 1 << 20
"""What is dequeued is acknowledged after that much of it, else with the next heartbeat: far less than the window, and a
message of its own for each would cost more threads' turns than the message that it is for."""

log = structlog.get_logger("remote-queue")


class RemoteReader:
    """The reading end on another host; has the methods of QueueReader."""

    def __init__(
        self, handle: Handle, reader_id: str, codec: Codec, doorbell: Doorbell | None, timeout_s: float, keys: CurveKeys
    ) -> None:
        self.name = f"{handle.queue.split('/')[1]} (remote reader {reader_id})"
        self.codec = codec
        if not isinstance(codec, MsgpackCodec):
            raise HandoverRefused(f"queue {self.name}: only msgpack crosses the network, not {codec.name}")
        self._handle = handle
        self._id = reader_id
        self._session = secrets.token_bytes(16)
        self._last: int | None = None  # number of the queue's last message, once the writer has ended it
        self._inbox: deque[bytes | memoryview] = deque()
        self._early: dict[int, bytes | memoryview] = {}  # what has overtaken others, over the other connection
        self._data: SealedSocket | None = None
        self._taking_up: TakeUp | None = None  # one at a time
        self._ask_at, self._ask_pause_s = 0.0, ASK_S
        self._arriving = threading.Lock()  # so that `watch` misses none, and gives none twice
        self._on_arrival: Callable[[Any], None] | None = None
        self._received = self._done = self._acknowledged = 0
        self._dequeued_bytes = 0  # that are not acknowledged
        self._head = msgspec.msgpack.Decoder(ToReader)
        self._joined = threading.Event()
        self._ended = ""  # why
        self._takes_leave = False
        self._silent_s = 0.0  # for how long the writer was silent, if that is why
        self._connection = Connection()
        self._others: OtherHosts | None = None  # if it ends as soon as the writer's host is suspected
        self._last_message_at = time.monotonic()
        self._send_at = 0.0
        with ExitStack() as opened:
            self._own_bell = doorbell is None
            self._bell = opened.enter_context(Doorbell()) if doorbell is None else doorbell
            self._io = SocketThread("queue-remote-reader", LEAVE_S)
            opened.callback(self._io.discard)
            self._dealer = self._io.context.socket(zmq.DEALER)
            self._dealer.setsockopt(zmq.RCVHWM, 0)  # the window limits
            self._dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            use_curve(self._dealer, keys, handle.remote_key)
            beat(self._dealer)
            monitor = self._dealer.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED)
            connect(self._dealer, handle.remote)
            self._io.start(self._turn, {self._dealer: self._receive, monitor: partial(self._look, monitor)})
            opened.pop_all()
        if not self._joined.wait(timeout_s):
            why = self._ended
            self.shutdown()
            raise WaitTimeout(f"queue {self.name}: {handle.remote} did not admit us within {timeout_s} s {why}")
        if self._ended:
            refusal = self._ended
            self.shutdown()
            raise HandoverRefused(f"queue {self.name}: {refusal}")

    def fileno(self) -> int:
        """Of the data connection: see workers.ipc.sockets.Source."""
        return self._data.fileno() if self._data is not None else -1

    def pump(self) -> None:
        """See workers.ipc.sockets.Source."""
        data = self._data
        if data is None:
            return
        try:
            for head, buffers in data.take():
                if len(buffers) != 1:
                    raise QueueClosed(f"its data connection has a message of {len(buffers)} parts")
                self._arrived(self._head.decode(head), buffers[0])
        except (QueueClosed, msgspec.MsgspecError) as error:
            log.info("data_connection_ended", queue=self.name, reason=str(error))
            self._data_lost()

    def pending(self) -> bool:
        return bool(self._inbox) or bool(self._ended)

    def try_dequeue(self) -> Any:
        if not self._inbox:
            self.pump()
        if not self._inbox:
            if self._silent_s:
                silent = QueueSilent(f"queue {self.name}: {self._ended}")
                silent.silent_s = self._silent_s
                raise silent
            if self._ended:
                raise QueueClosed(f"queue {self.name}: {self._ended}")
            return None
        data = self._inbox.popleft()
        self._done += 1
        self._dequeued_bytes += len(data)
        if self._acks_due():
            self._io.wake()
        return self.codec.decode(data, ())

    def _acks_due(self) -> bool:
        return self._done - self._acknowledged >= ACK_MESSAGES or self._dequeued_bytes >= ACK_BYTES

    def dequeue(self, timeout_s: float) -> Any:
        if not self._bell.wait(self.pending, timeout_s):
            raise QueueTimeout(f"queue {self.name}: no message from {self._handle.remote} within {timeout_s} s")
        return self.try_dequeue()

    def watch(self, on_arrival: Callable[[Any], None]) -> None:
        """See MessageQueue."""
        with self._arriving:
            self._on_arrival = on_arrival
            for data in tuple(self._inbox):
                on_arrival(self.codec.decode(data, ()))

    @property
    def acks(self) -> Acks | None:
        """What the kernel knew of the connection at the last look; looks are made once `end_on_silence` is asked."""
        return self._connection.acks

    def end_on_silence(self, others: OtherHosts) -> None:
        """See MessageQueue."""
        others.add(self._connection, self._handle.host)
        self._others = others
        self._io.turn_s = LOOK_S
        self._io.wake()

    def shutdown(self) -> None:
        """Leave. Idempotent."""
        if self._io.stopping:
            return
        self._takes_leave = not self._ended  # else no writer is left that would hear it
        self._ended = self._ended or "shut down"
        self._io.stop()
        self._data_lost()
        if self._others is not None:
            self._others.discard(self._connection)
        self._bell.ring()
        if self._own_bell:
            self._bell.close()

    # ---- socket thread

    def _receive(self) -> None:
        head_data, data = self._dealer.recv_multipart(zmq.NOBLOCK)
        head = msgspec.msgpack.decode(head_data, type=ToReader)
        self._last_message_at = time.monotonic()
        if head.refused:
            self._end(head.refused)
        elif head.number == 0:
            if not self._joined.is_set():
                self._received = self._done = head.start
                self._joined.set()
            if head.offer is not None and self._wants_data(self._last_message_at):
                self._taking_up = TakeUp(self._io, head.offer, self._data_made, self._data_failed)
        else:
            self._arrived(head, data)
            self._bell.ring()

    def _wants_data(self, now: float) -> bool:
        under_way = self._taking_up is not None and not self._taking_up.settled
        return CAN_SEAL and self._data is None and not under_way and now >= self._ask_at

    def _data_failed(self, why: str) -> None:
        if self._ask_pause_s == ASK_S:  # the first only: it may be so for good
            log.warning("data_port_not_reached", queue=self.name, reason=why)
        self._ask_at = time.monotonic() + self._ask_pause_s
        self._ask_pause_s = min(ASK_MAX_S, 2 * self._ask_pause_s)

    def _data_made(self, sealed: SealedSocket) -> None:
        self._ask_pause_s = ASK_S
        if self._ended or self._data is not None:
            return sealed.close()
        self._data = sealed
        self._bell.watch(self)

    def _data_lost(self) -> None:
        """From any thread. What was on its way comes over ZeroMQ."""
        with self._arriving:
            if self._data is None:
                return
            self._bell.unwatch(self)
            sealed, self._data = self._data, None
        sealed.close()
        if not self._io.stopping:
            self._send_at = 0.0
            self._io.wake()

    def _arrived(self, head: ToReader, data: bytes | memoryview) -> None:
        """A numbered message, over either connection, in the thread that has read it."""
        with self._arriving:
            if head.number == END:
                self._last = head.start  # messages that it has overtaken come over the other connection
            elif head.number > self._received:
                self._early[head.number] = data
            while (ripe := self._early.pop(self._received + 1, None)) is not None:
                self._received += 1
                if self._on_arrival is not None:
                    self._on_arrival(self.codec.decode(ripe, ()))
                self._inbox.append(ripe)
        if self._last is not None and self._received >= self._last:
            self._end("the writer has ended it")

    def _look(self, monitor: zmq.Socket[Any]) -> None:
        """A connection is made. Or not, or not again: a dead process is known by that long before it is silent.

        A writer listens before its handle is known, so a refusal is no matter of a moment.
        """
        seen = recv_monitor_message(monitor, zmq.NOBLOCK)
        if seen["event"] == zmq.EVENT_CONNECTED:
            self._connection.made(seen["value"])
        elif self._last is not None and self._data is not None:
            return  # the rest is on its way there, and its end is seen
        elif not self._ended and _is_refused(self._handle.remote):
            self._end(f"its writer's process has ended{self._missing()}")

    def _missing(self) -> str:
        return "" if self._last is None else f" after message {self._last}, of which {self._received} have arrived"

    def _end(self, why: str) -> None:
        self._ended = self._ended or why
        if self._others is not None:
            self._others.discard(self._connection)
        self._joined.set()
        self._bell.ring()

    def _turn(self) -> None:
        now = time.monotonic()
        if self._taking_up is not None:
            self._taking_up.look(now)
            if self._io.stopping:
                self._taking_up.close()
        if self._io.stopping and not self._takes_leave:
            self._dealer.linger = 0
            return
        if self._joined.is_set() and not self._ended:
            silent_s = now - self._last_message_at
            if silent_s <= REMOTE_SILENCE_S:
                others = self._others
                silent_s = self._connection.silent_s(now, others.cut_off) if others is not None else 0.0
            if silent_s:
                self._silent_s = silent_s
                self._end(f"its writer has been silent for {silent_s:.3f} s{self._missing()}")
        if now >= self._send_at or self._acks_due() or self._io.stopping:
            self._dequeued_bytes = 0  # first: what is dequeued meanwhile is counted twice rather than not
            self._send_at, self._acknowledged = now + HEARTBEAT_S / 2, self._done
            message = ToWriter(
                self._handle.queue,
                self._id,
                self._session,
                joined=self._joined.is_set(),
                received=self._received,
                done=self._acknowledged,
                leaving=self._io.stopping,
                data=self._wants_data(now),
            )
            try:
                self._dealer.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
            except zmq.Again:
                self._send_at = now + HEARTBEAT_S / 4


def _is_refused(endpoint: str) -> bool:
    """Whether the host says that no process listens there. A host that says nothing may only be cut off."""
    where = urlsplit(endpoint)
    try:
        socket.create_connection((where.hostname or "", where.port or 0), timeout=PROBE_S).close()
    except OSError as error:
        return error.errno == errno.ECONNREFUSED
    return False
