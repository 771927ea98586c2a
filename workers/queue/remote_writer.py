"""Readers on other hosts: the same queue over ZeroMQ TCP, encrypted (CURVE), acknowledged, msgpack only.

Each message has a number. The writer keeps what a reader has not acknowledged and sends it again after a reconnect;
a reader takes each number once, in order, and acknowledges what its owner has dequeued, many at a time. So a slow
reader holds up at most a window of unacknowledged messages. A side that is silent for REMOTE_SILENCE_S is gone.

Where it can be had a reader has a data connection beside (`sealed.py`): messages leave over it at once, in the thread
that enqueues. Joins, heartbeats and acknowledgements stay with ZeroMQ; so does everything once that connection ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import msgspec
import structlog
import zmq

from membership.base.errors import QueueClosed, QueueError
from membership.base.timing import ENQUEUE_TIMEOUT_S, REMOTE_SILENCE_S
from workers.queue.codec import MsgpackCodec
from workers.queue.curve import Authenticator, serve_curve
from workers.queue.data_port import DataPort, flush_later
from workers.queue.endpoints import listen_for_hosts
from workers.queue.handle import Handle, Offer, Remote
from workers.queue.remote_wire import END, HEARTBEAT_S, LINGER_S, SocketThread, ToReader, ToWriter
from workers.queue.sealed import SealedSocket, drain
from workers.queue.silence import Connection
from workers.queue.writer import QueueWriter, SlowReaders

WINDOW = 1024  # messages that a reader may be behind
WINDOW_BYTES = 64 << 20
OFFER_S = 2.0  # between two offers of a data connection
log = structlog.get_logger("remote-queue")


@dataclass
class _Peer:
    session: bytes
    route: bytes
    start: int  # it gets the messages behind this number
    last_message_at: float
    sent: int  # highest number given to ZeroMQ on this connection
    unacknowledged: deque[tuple[int, bytes]] = field(default_factory=deque)
    nbytes: int = 0  # of these
    data: SealedSocket | None = None
    watched: Connection = field(default_factory=Connection)  # that of `data`
    offer: Offer | None = None  # that it may take up
    offered_at: float = 0.0

    def unsent(self) -> Iterator[tuple[int, bytes]]:
        """What was not sent on this connection; numbers follow each other."""
        if not self.unacknowledged:
            return iter(())
        first, _ = self.unacknowledged[0]
        return islice(list(self.unacknowledged), max(0, self.sent - first + 1), None)


class RemoteWriter:
    """The writer's side. `sending(timeout_s)` waits for room; what is added within it goes to all readers."""

    def __init__(self, queue: str, remote: Remote, on_change: Callable[[], None]) -> None:
        """`on_change` runs in the socket's thread when a reader has joined or left."""
        self._queue = queue
        self._on_change = on_change
        self._one_sender = threading.Lock()
        self._changed = threading.Condition()
        self._peers: dict[str, _Peer] = {}
        self._number = 0
        self._closed = False
        self._heartbeat_at = 0.0
        self._encode = msgspec.msgpack.Encoder().encode
        self.public_key = remote.keys.public
        self._io = SocketThread("queue-remote-writer")
        with ExitStack() as opened:
            opened.callback(self._io.discard)
            self._auth = Authenticator(self._io.context, remote.allowed)
            self._router = self._io.context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
            self._router.setsockopt(zmq.SNDHWM, 0)  # the window limits
            serve_curve(self._router, remote.keys)
            self.address = listen_for_hosts(self._router, remote.host, remote.ports)
            self._data_port = DataPort(self._io, remote.host, remote.ports)
            opened.callback(self._data_port.close)
            self._io.start(self._turn, {self._router: self._receive, self._auth.socket: self._auth.answer})
            opened.pop_all()

    def readers(self) -> tuple[str, ...]:
        """Ids of those that are in."""
        with self._changed:
            return tuple(self._peers)

    @contextmanager
    def sending(self, timeout_s: float) -> Iterator[Callable[[bytes], int]]:
        """Room for one message at every reader; call what is yielded to send it: to how many. QueueClosed."""
        with self._one_sender:
            with self._changed:
                if not self._changed.wait_for(lambda: self._closed or not self._full(), timeout_s):
                    slow = self._full()
                    names = ", ".join(slow)
                    raise SlowReaders(f"queue {self._queue}: remote readers do not acknowledge: {names}", slow)
                self._check_open()
            yield self._append

    def drop(self, reader_id: str) -> bool:
        """Forget a reader; its next message is refused."""
        with self._changed:
            return self._forget(reader_id)

    def close(self) -> None:
        """End the queue for its readers. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            for peer in self._peers.values():
                peer.unacknowledged.append((END, b""))
        self._io.stop()

    def _append(self, data: bytes) -> int:
        with self._changed:
            self._check_open()
            self._number += 1
            for peer in self._peers.values():
                peer.unacknowledged.append((self._number, data))
                peer.nbytes += len(data)
                if peer.data is not None and peer.sent == self._number - 1:
                    self._transmit(peer, self._number, data)
            if any(peer.sent != self._number for peer in self._peers.values()):
                self._io.wake()
            return len(self._peers)

    def _check_open(self) -> None:
        if self._closed:
            raise QueueClosed(f"queue {self._queue} is shut down")

    def _forget(self, reader_id: str) -> bool:
        peer = self._peers.pop(reader_id, None)
        if peer is not None:
            self._io.call(partial(self._data_port.withdraw, peer.offer))
            self._data_lost(peer)
        self._changed.notify_all()
        return peer is not None

    def _full(self) -> list[str]:
        return [
            reader_id
            for reader_id, peer in self._peers.items()
            if len(peer.unacknowledged) >= WINDOW or peer.nbytes >= WINDOW_BYTES
        ]

    # ---- socket thread

    def _receive(self) -> None:
        route, data = self._router.recv_multipart(zmq.NOBLOCK)
        try:
            message = msgspec.msgpack.decode(data, type=ToWriter)
        except msgspec.MsgspecError as error:
            log.warning("remote_message_malformed", error=str(error))
            return
        with self._changed:
            before = len(self._peers)
            refusal = self._take(route, message)
            changed = len(self._peers) != before
        if refusal:
            self._send(route, ToReader(0, refused=refusal))
        if changed:
            self._on_change()

    def _take(self, route: bytes, message: ToWriter) -> str:
        peer = self._peers.get(message.reader_id)
        if message.queue != self._queue:
            return "no such queue here"
        if peer is not None and peer.session != message.session:
            return f"reader {message.reader_id} has joined already"
        if message.leaving:
            self._forget(message.reader_id)
        elif peer is None:
            if message.joined:
                return "the writer has dropped this reader"
            peer = _Peer(message.session, route, self._number, time.monotonic(), self._number)
            self._peers[message.reader_id] = peer
            self._send(route, ToReader(0, peer.start, offer=self._offer(message, peer)))
        else:
            peer.last_message_at = time.monotonic()
            if route != peer.route:  # a new connection: what was on its way in the old one is lost
                peer.route, peer.sent = route, max(message.received, peer.start)
            while peer.unacknowledged and peer.unacknowledged[0][0] <= message.done:
                peer.nbytes -= len(peer.unacknowledged.popleft()[1])
            if (offer := self._offer(message, peer)) is not None:
                self._send(route, ToReader(0, peer.start, offer=offer))
        self._changed.notify_all()
        return ""

    def _turn(self) -> None:
        now = time.monotonic()
        heartbeat_due = now >= self._heartbeat_at
        if heartbeat_due:
            self._heartbeat_at = now + HEARTBEAT_S
        self._data_port.look(now)
        with self._changed:
            for reader_id, peer in list(self._peers.items()):
                if now - peer.last_message_at > REMOTE_SILENCE_S:
                    log.warning("remote_reader_silent", queue=self._queue, reader=reader_id)
                    self._forget(reader_id)
                    continue
                if peer.data is not None and (silent_s := peer.watched.silent_s(now)):
                    log.info("data_connection_silent", queue=self._queue, reader=reader_id, silent_s=silent_s)
                    self._data_lost(peer)
                if heartbeat_due:
                    self._send(peer.route, ToReader(0, peer.start))
                self._send_rest(peer)
            if self._io.stopping:
                self._finish()
                self._data_port.close()

    def _send_rest(self, peer: _Peer) -> None:
        for number, data in peer.unsent():
            if not self._transmit(peer, number, data):
                return

    def _transmit(self, peer: _Peer, number: int, data: bytes) -> bool:
        head = ToReader(number, self._number if number == END else 0)
        if peer.data is not None:
            try:
                if not peer.data.send(self._encode(head), [memoryview(data)]):
                    flush_later(self._io, peer.data, partial(self._unsendable, peer, peer.data))
            except QueueClosed:
                self._data_lost(peer)
                self._io.wake()
                return False
        elif not self._send(peer.route, head, data):
            return False
        peer.sent = number
        return True

    def _offer(self, message: ToWriter, peer: _Peer) -> Offer | None:
        now = time.monotonic()
        if not message.data or peer.data is not None or now - peer.offered_at < OFFER_S:
            return None
        self._data_port.withdraw(peer.offer)
        peer.offered_at = now
        peer.offer = self._data_port.offer(partial(self._data_made, message.reader_id, peer))
        return peer.offer

    def _data_made(self, reader_id: str, peer: _Peer, sealed: SealedSocket) -> None:
        with self._changed:
            if self._peers.get(reader_id) is not peer or self._io.stopping:
                return sealed.close()
            peer.data = sealed
            peer.watched.made(sealed.fileno())
            self._io.watch(sealed, partial(self._data_ended, peer, sealed))

    def _data_ended(self, peer: _Peer, sealed: SealedSocket) -> None:
        """Its reader sends nothing there."""
        with self._changed:
            try:
                sealed.take()
            except QueueClosed:
                self._data_lost(peer)
        raise zmq.Again

    def _unsendable(self, peer: _Peer, sealed: SealedSocket) -> None:
        """It has ended before it has taken all."""
        with self._changed:
            if peer.data is sealed:
                self._data_lost(peer)

    def _data_lost(self, peer: _Peer) -> None:
        """What is not acknowledged may not have arrived."""
        sealed, peer.data = peer.data, None
        if sealed is None:
            return
        if peer.unacknowledged:
            peer.sent = peer.unacknowledged[0][0] - 1
        self._io.call(partial(self._close, sealed))

    def _finish(self) -> None:
        """The end of the queue: what a data connection has not taken by then is lost, and the reader can tell."""
        by_data = {reader_id: peer.data for reader_id, peer in self._peers.items() if peer.data is not None}
        left, ended = drain(by_data, LINGER_S)
        for reader_id, peer in self._peers.items():
            if reader_id in left:
                log.warning("remote_reader_left_behind", queue=self._queue, reader=reader_id, waited_s=LINGER_S)
                self._send(peer.route, ToReader(END, self._number))
            elif reader_id in ended or peer.data is None:  # the rest goes over ZeroMQ, as ever
                self._data_lost(peer)
                self._send_rest(peer)
            peer.data = None
        for sealed in by_data.values():
            self._close(sealed)

    def _close(self, sealed: SealedSocket) -> None:
        self._io.forget(sealed)
        sealed.close()

    def _send(self, route: bytes, head: ToReader, data: bytes = b"") -> bool:
        try:
            self._router.send_multipart([route, msgspec.msgpack.encode(head), data], zmq.NOBLOCK)
        except (zmq.Again, zmq.ZMQError) as error:  # not connected (now): it comes back, or falls silent
            log.debug("remote_reader_unreachable", error=str(error))
            return False
        return True


class CrossHostWriter:
    """A writing end for readers of this host and of others; has the methods of QueueWriter. Takes over `local`.

    Whatever fails, `local` is shut down. QueueError if the codec is not msgpack: nothing else may cross the network.
    """

    def __init__(self, local: QueueWriter, remote: Remote) -> None:
        self.name = local.name
        self._local = local
        try:
            if not isinstance(local.codec, MsgpackCodec):
                raise QueueError(f"queue {local.name}: only msgpack crosses the network, not {local.codec.name}")
            self._remote = RemoteWriter(local.handle().queue, remote, on_change=local.look_again)
        except BaseException:
            local.shutdown()
            raise
        local.elsewhere = self._remote.readers

    def enqueue(self, message: Any, timeout_s: float = ENQUEUE_TIMEOUT_S) -> int:
        data, _ = self._local.codec.encode(message)
        with self._remote.sending(timeout_s) as send:
            near = self._local.enqueue(message, timeout_s) if self._local.readers else 0
            return near + send(data)

    def handle(self) -> Handle:
        """How to join, from this host or another."""
        return msgspec.structs.replace(
            self._local.handle(), remote=self._remote.address, remote_key=self._remote.public_key
        )

    @property
    def readers(self) -> tuple[str, ...]:
        return (*self._local.readers, *self._remote.readers())

    def wait_until_ready(self, readers: Iterable[str], timeout_s: float) -> None:
        self._local.wait_until_ready(readers, timeout_s)

    def drop_reader(self, reader_id: str) -> bool:
        return self._local.drop_reader(reader_id) or self._remote.drop(reader_id)

    def shutdown(self) -> None:
        self._local.shutdown()
        self._remote.close()
