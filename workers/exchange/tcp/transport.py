"""Makes links over TCP. One thread owns the sockets: one that listens, and one per link that sends.

A link whose connection ends, or whose host falls silent, has ended. The side that had made it makes it again
(`redial.py`). Each side notifies the other of the end, where that still arrives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
import structlog
import zmq
from zmq.utils.monitor import recv_monitor_message

from membership.base.errors import ElasticError, QueueError, RankDied
from membership.base.network import Network
from membership.base.rank_id import RankId
from membership.base.timing import LINK_DIAL_S, REMOTE_SILENCE_S
from workers.exchange.links import Links
from workers.exchange.tcp import redial
from workers.exchange.tcp.data import LinkData
from workers.exchange.tcp.ledger import Ledger
from workers.exchange.tcp.link import TcpLink
from workers.exchange.tcp.redial import Redial
from workers.exchange.tcp.wire import Answer, Ask, Bulk, BulkTaken, Bye, Hello, Message, Refused, Welcome
from workers.protocol.exchange_handle import TcpHandle
from workers.queue.curve import Authenticator, serve_curve, use_curve
from workers.queue.data_port import CAN_SEAL, DataPort, TakeUp
from workers.queue.endpoints import connect, listen_for_hosts
from workers.queue.handle import Offer
from workers.queue.network import connecting_keys, listening_keys, same_secret
from workers.queue.remote_wire import HEARTBEAT_S, SocketThread
from workers.queue.sealed import SealedSocket
from workers.queue.silence import LOOK_S, Acks, Connection, beat

MOST_BYTES = 32 << 20  # of the rows of one request, and of one answer
MAX_PAIRS = 1 << 15
REPORT_S = 1.0  # between two reports of what links have carried
ENDS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
log = structlog.get_logger("exchange")


class _Dial:
    """A link that is being made by this side, for the first time or `again`."""

    def __init__(self, link: TcpLink, to: TcpHandle, *, again: bool = False) -> None:
        self.link, self.to, self.again = link, to, again
        self.attempt = 0
        self.settled = threading.Event()
        self.error = ""

    def settle(self, error: str = "") -> None:
        self.error = error
        self.settled.set()


class TcpTransport:
    """`exchange.link.Transport` for ranks of different hosts."""

    def __init__(self, links: Links, network: Network, most_bytes: int = MOST_BYTES) -> None:
        self._links = links
        self._network = network
        self._most_bytes = most_bytes
        self._dials: dict[RankId, _Dial] = {}  # this and what follows belongs to the thread
        self._redials: dict[RankId, Redial] = {}  # peers that this side has linked with
        self._attempts = 0
        self._routes: dict[bytes, TcpLink] = {}  # of the connections over which peers send
        self._senders: dict[TcpLink, zmq.Socket[Any]] = {}
        self._connections: dict[TcpLink, Connection] = {}  # of the senders
        self._ledger, self._report_at = Ledger(), 0.0
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder = msgspec.msgpack.Decoder(Message)
        self._heads = msgspec.msgpack.Decoder(Ask | Answer)  # the main thread's
        self._io = SocketThread("exchange-tcp")
        self._offers: dict[TcpLink, Offer] = {}  # that the peer may take up
        self._taking_up: dict[TcpLink, TakeUp] = {}  # what peers have offered
        with ExitStack() as opened:
            opened.callback(self._io.discard)
            auth = Authenticator(self._io.context, [connecting_keys(network).public])
            self._listener = self._io.context.socket(zmq.ROUTER)
            self._listener.setsockopt(zmq.RCVHWM, 0)  # at most one request, answer and Bulk per peer are under way
            beat(self._listener, HEARTBEAT_S)
            serve_curve(self._listener, listening_keys(network))
            address = listen_for_hosts(self._listener, network.address, network.ports)
            self._handle = TcpHandle(address, listening_keys(network).public)
            self._data_port = DataPort(self._io, network.address, network.ports)
            opened.callback(self._data_port.close)
            self._io.start(self._turn, {self._listener: self._receive, auth.socket: auth.answer})
            opened.pop_all()

    def handle(self) -> bytes:
        """Where peers reach this rank."""
        return msgspec.msgpack.encode(self._handle)

    def most_pairs(self, row_bytes: int) -> int:
        """The number of pairs whose rows and answer fit into one request."""
        return max(1, min(self._most_bytes // row_bytes, MAX_PAIRS))

    def dial(self, peer: RankId, handle: bytes, deadline: float) -> None:
        """Connect to `peer`, and have it connect to us. RankDied if it cannot be reached, or refuses."""
        to = msgspec.msgpack.decode(handle, type=TcpHandle)
        try:
            same_secret(to.key, self._network)
        except QueueError as error:
            raise RankDied(f"{peer} cannot be linked: {error}", hint=error.hint) from error
        dial = _Dial(self._new_link(peer), to)
        self._run(partial(self._begin, dial))
        if not dial.settled.wait(max(deadline - time.monotonic(), 0.001)):
            dial.error = "it did not answer in time"
        if dial.error:
            dial.link.hang_up()
            raise RankDied(f"{peer} at {to.address} cannot be linked: {dial.error}")
        try:
            self._links.add(dial.link)
        except BaseException:
            dial.link.hang_up()
            raise
        self._links.doorbell.ring()  # it may have asked something before the link was known
        if dial.link.ended:
            self._links.retire(dial.link, returns=True)

    def close(self) -> None:
        """Accept no more peers, and let the linked ones see that we are gone."""
        if not self._io.stopping:
            self._run(self._close_all)
            self._io.stop()

    def _new_link(self, peer: RankId) -> TcpLink:
        return TcpLink(self._links.me.incarnation, peer, self._send_soon, self._end_soon)

    def _send_soon(self, link: TcpLink, head: Message, buffers: Sequence[memoryview]) -> None:
        data = link.data
        if data is not None and not isinstance(head, Bulk):  # rows do not wait behind what is large
            data.send(self._encode(head), buffers)
        else:
            self._run(partial(self._send, link, head, buffers))

    def _end_soon(self, link: TcpLink) -> None:
        self._run(partial(self._hang_up, link))

    def _run(self, action: partial[None] | Any) -> None:
        if not self._io.stopping:
            self._io.call(action)

    # ---- the thread

    def _turn(self) -> None:
        now = time.monotonic()
        for link, connection in list(self._connections.items()):
            if silent_s := connection.silent_s(now):
                self._ledger.suspected(link.peer)
                self._lost(link, f"its host has been silent for {silent_s:.3f} s")
            elif link.data is not None and (silent_s := link.data.silent_s(now)):
                self._data_lost(link, f"its data connection has been silent for {silent_s:.3f} s")
        self._data_port.look(now)
        for taking_up in list(self._taking_up.values()):
            taking_up.look(now)
        for peer, known in list(self._redials.items()):
            if now >= known.due:
                self._try_again(peer, known, now)
        if now >= self._report_at:
            self._report_at = now + REPORT_S
            linked = set(self._routes.values())
            acks = {link.peer: _acks(link, each, now) for link, each in self._connections.items() if link in linked}
            self._links.far = self._ledger.report(acks, self._links.all_returning)

    def _try_again(self, peer: RankId, known: Redial, now: float) -> None:
        dial = self._dials.get(peer)
        if dial is not None and dial.again:
            self._lost(dial.link, "it did not answer in time")
        elif not self._links.returning(peer):
            del self._redials[peer]
        elif dial is None:
            self._redials[peer] = redial.begin(known, now)
            self._begin(_Dial(self._new_link(peer), known.to, again=True))

    def _begin(self, dial: _Dial) -> None:
        peer = dial.link.peer
        if (older := self._dials.get(peer)) is not None:
            self._drop(older.link, "it is dialled once more")
        self._attempts += 1
        dial.attempt = self._attempts
        self._dials[peer] = dial
        try:
            self._connect(dial.link, dial.to, LINK_DIAL_S if dial.again else REMOTE_SILENCE_S)
        except (zmq.ZMQError, QueueError) as error:
            del self._dials[peer]
            return dial.settle(str(error))
        known = self._redials.get(peer)
        data = CAN_SEAL and (known is None or redial.with_data(known, time.monotonic()))
        self._send(dial.link, Hello(self._links.hello(peer), self._handle, dial.attempt, data))

    def _connect(self, link: TcpLink, to: TcpHandle, timeout_s: float = REMOTE_SILENCE_S) -> None:
        """A connection to the peer, over which we send. It is made once: when it ends, so does the link."""
        keys = connecting_keys(same_secret(to.key, self._network))
        sender = self._io.context.socket(zmq.DEALER)
        sender.setsockopt(zmq.SNDHWM, 0)
        sender.setsockopt(zmq.RECONNECT_IVL, -1)
        sender.setsockopt(zmq.CONNECT_TIMEOUT, int(timeout_s * 1000))
        beat(sender)
        use_curve(sender, keys, to.key)
        monitor = sender.get_monitor_socket(ENDS | zmq.EVENT_CONNECTED)
        self._io.watch(monitor, partial(self._look, link, monitor))
        self._io.watch(sender, partial(self._refused, link, sender))
        try:
            connect(sender, to.address)
        except BaseException:
            self._close_socket(sender)
            raise
        self._senders[link], self._connections[link] = sender, Connection()
        self._io.turn_s = LOOK_S

    def _look(self, link: TcpLink, monitor: zmq.Socket[Any]) -> None:
        if link not in self._senders:
            raise zmq.Again  # it has ended by now, and the socket is closed
        seen = recv_monitor_message(monitor, zmq.NOBLOCK)
        if seen["event"] == zmq.EVENT_CONNECTED:
            self._connections[link].made(seen["value"])
        elif seen["event"] & ENDS:
            self._lost(link, "its connection has ended")

    def _refused(self, link: TcpLink, sender: zmq.Socket[Any]) -> None:
        if link not in self._senders:
            raise zmq.Again  # as above
        head = self._decoder.decode(sender.recv_multipart(zmq.NOBLOCK)[0])
        self._lost(link, head.reason if isinstance(head, Refused) else "it answered something else than asked")

    def _receive(self) -> None:
        route, data, *buffers = self._listener.recv_multipart(zmq.NOBLOCK)
        try:
            head = self._decoder.decode(data)
            link = self._routes.get(route)
            if isinstance(head, Hello):
                self._admit(route, head)
            elif isinstance(head, Welcome):
                self._welcomed(route, head)
            elif link is None:
                self._say_refused(route, "there is no link")
            elif isinstance(head, Bye):
                self._redials.pop(link.peer, None)
                self._lost(link, "it has hung up", returns=False)
            elif isinstance(head, Ask | Answer):
                link.arrived(head, buffers)
                self._links.doorbell.ring()
            elif isinstance(head, Bulk):
                link.bulk_arrived(buffers)
                self._send(link, BulkTaken(head.number))
            elif isinstance(head, BulkTaken):
                link.bulk_taken(head.number)
                self._links.doorbell.ring()
        except (ElasticError, msgspec.MsgspecError) as error:
            log.warning("exchange_message_dropped", error=str(error))

    def _admit(self, route: bytes, head: Hello) -> None:
        link: TcpLink | None = None
        try:
            same_secret(head.handle.key, self._network)
            link = self._new_link(self._links.admit(head.hello))
            self._connect(link, head.handle)
            self._routes[route] = link
            offer = self._data_port.offer(partial(self._data_made, link)) if head.data else None
            if offer is not None:
                self._offers[link] = offer
            self._send(link, Welcome(self._links.hello(link.peer), head.attempt, offer))
            self._links.add(link)
        except (ElasticError, msgspec.MsgspecError, zmq.ZMQError) as error:
            if link is not None:
                self._drop(link)
            self._say_refused(route, str(error))

    def _say_refused(self, route: bytes, why: str) -> None:
        self._listener.send_multipart([route, self._encode(Refused(why))], zmq.NOBLOCK)

    def _welcomed(self, route: bytes, head: Welcome) -> None:
        peer, now = self._links.admit(head.hello), time.monotonic()
        dial = self._dials.get(peer)
        if dial is None or dial.attempt != head.attempt:
            return  # an earlier attempt's
        del self._dials[peer]
        self._routes[route] = dial.link
        self._redials[peer] = redial.linked(self._redials.get(peer, Redial(dial.to, now)), now)
        if head.offer is not None:
            made, failed = partial(self._data_made, dial.link), partial(self._data_failed, dial.link)
            self._taking_up[dial.link] = TakeUp(self._io, head.offer, made, failed)
        if dial.again:
            self._links.add(dial.link, again=True)
            self._links.doorbell.ring()
            log.info("exchange_link_back", peer=peer.rank)
        dial.settle()

    def _data_made(self, link: TcpLink, sealed: SealedSocket) -> None:
        if link not in self._senders:  # it has ended meanwhile
            return sealed.close()
        self._taking_up.pop(link, None)
        ended = partial(self._data_ended, link)
        link.data = LinkData(sealed, self._links.doorbell, self._io, partial(self._data_arrived, link), ended)

    def _data_arrived(self, link: TcpLink, data: bytes, buffers: Sequence[memoryview]) -> None:
        try:
            head = self._heads.decode(data)
            link.arrived(head, buffers)
        except (ElasticError, msgspec.MsgspecError) as error:
            log.warning("exchange_message_dropped", error=str(error))

    def _data_ended(self, link: TcpLink, why: str) -> None:
        self._run(lambda: self._data_lost(link, why) if link in self._senders else None)

    def _data_lost(self, link: TcpLink, why: str) -> None:
        if (known := self._redials.get(link.peer)) is not None:
            self._redials[link.peer] = redial.data_ended(known, time.monotonic())
        self._lost(link, why)

    def _data_failed(self, link: TcpLink, why: str) -> None:
        """It goes on without: slower, no less."""
        log.warning("data_port_not_reached", peer=link.peer.rank, reason=why)

    def _send(self, link: TcpLink, head: Message, buffers: Sequence[memoryview] = ()) -> None:
        sender = self._senders.get(link)
        if sender is None:
            return  # it has ended
        try:
            sender.send_multipart([self._encode(head), *buffers], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._lost(link, str(error))

    def _lost(self, link: TcpLink, why: str, *, returns: bool = True) -> None:
        if link in self._senders:
            if link.peer not in self._dials:  # else it is one attempt of many
                log.info("exchange_link_ended", peer=link.peer.rank, reason=why)
            for route in [route for route, other in self._routes.items() if other is link]:
                self._say_refused(route, why)
                if returns:
                    self._ledger.cut(link.peer)
            if (known := self._redials.get(link.peer)) is not None:
                self._redials[link.peer] = redial.cut(known, time.monotonic())
        self._drop(link, why)
        self._links.retire(link, returns=returns)

    def _hang_up(self, link: TcpLink) -> None:
        if link in self._senders:  # else it was cut, and may return
            self._redials.pop(link.peer, None)
            self._send(link, Bye())
        self._drop(link)

    def _drop(self, link: TcpLink, why: str = "given up") -> None:
        link.ended = True
        dial = self._dials.get(link.peer)
        if dial is not None and dial.link is link:
            del self._dials[link.peer]
            dial.settle(why)
        self._routes = {route: other for route, other in self._routes.items() if other is not link}
        self._data_port.withdraw(self._offers.pop(link, None))
        if (taking_up := self._taking_up.pop(link, None)) is not None:
            taking_up.close()
        sender = self._senders.pop(link, None)
        connection = self._connections.pop(link, None)
        if connection is not None:
            self._ledger.closed(link.peer, _acks(link, connection, time.monotonic()))
        if link.data is not None:
            link.data.close()
        if sender is not None:
            self._close_socket(sender)

    def _close_socket(self, sender: zmq.Socket[Any]) -> None:
        monitor = sender.get_monitor_socket(ENDS)  # the one that was made
        self._io.unwatch(monitor)
        self._io.unwatch(sender)
        sender.disable_monitor()
        monitor.close(linger=0)
        sender.close()

    def _close_all(self) -> None:
        for link in list(self._senders):
            self._hang_up(link)
        self._data_port.close()


def _acks(link: TcpLink, connection: Connection, now: float) -> Acks | None:
    """What the kernel knows of a link's connections."""
    return connection.acks if link.data is None else link.data.added_to(connection.acks, now)
