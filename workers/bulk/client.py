"""Asks another host's `BulkServer`: many questions may be open, each is waited for by its number.

For one thread. A host is gone once its connection has ended: at once if its agent dies, and within REMOTE_SILENCE_S if
its kernel says nothing more. Or if it says nothing for SILENT_S while it owes an answer, unless it said that the answer
takes longer. A connection that ended while nothing was owed is no loss: ZeroMQ has made another, or tries to. Pieces
are taken as ZeroMQ's own memory: they are copied once, to where they shall be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from membership.base.errors import ElasticError, QueueError
from membership.base.network import Network
from workers.protocol.weight_peers import Asked, File, Find, Peer, Place, Read, Said
from workers.queue.curve import use_curve
from workers.queue.endpoints import connect
from workers.queue.network import Purpose, connecting_keys, same_secret
from workers.queue.silence import beat

SILENT_S = 10.0
LOOK_S = 0.5
ENDS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED  # of a connection that was made, or could not be made
Data = memoryview


class PeerLost(ElasticError):
    """The other host does not answer, or refuses; the text names it."""


class BulkLink:
    """A connection to one host. `close` it."""

    def __init__(self, peer: Peer, network: Network, context: zmq.Context[Any], silent_s: float = SILENT_S) -> None:
        self.peer, self._silent_s = peer, silent_s
        self._numbers = count(1)
        self._arrived: dict[int, tuple[Said, Data]] = {}
        self._owed: set[int] = set()  # questions whose answers are wanted
        self._forgotten: set[int] = set()
        self._patient_until = 0.0  # an answer was promised for then
        try:
            ours = same_secret(peer.key.encode("ascii"), network, Purpose.WEIGHTS)
        except (QueueError, ValueError) as error:
            raise PeerLost(f"node {peer.node}: {error}") from error
        self._dealer = context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.RCVHWM, 0)  # we limit what is under way
        self._dealer.setsockopt(zmq.LINGER, 0)
        use_curve(self._dealer, connecting_keys(ours, Purpose.WEIGHTS), peer.key.encode("ascii"))
        beat(self._dealer)
        self._monitor = self._dealer.get_monitor_socket(ENDS)
        self._poller = zmq.Poller()
        for each in (self._dealer, self._monitor):
            self._poller.register(each, zmq.POLLIN)
        connect(self._dealer, peer.endpoint)

    def close(self) -> None:
        """What is open is not answered any more."""
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close()

    def ask(self, what: Find | Read | File) -> int:
        """Ask, and go on: the number of the question."""
        if not self._owed:
            self._pass_over_ends()
        number = next(self._numbers)
        self._owed.add(number)
        self._dealer.send(msgspec.msgpack.encode(Asked(number, what)))
        return number

    def forget(self, number: int) -> None:
        """Its answer is not wanted any more."""
        if self._arrived.pop(number, None) is None:
            self._owed.discard(number)
            self._forgotten.add(number)

    def find(self, names: list[str]) -> list[Place]:
        """Where these entries are there."""
        return self._wait(self.ask(Find(names)))[0].places

    def file(self, name: str) -> bytes:
        """A small file of its checkpoint."""
        return bytes(self._wait(self.ask(File(name)))[1])

    def take(self, number: int, waiting: Callable[[], object] = lambda: None) -> Data:
        """The bytes that were asked for. `waiting` is called now and then while they have been promised for later."""
        return self._wait(number, waiting)[1]

    def _pass_over_ends(self) -> None:
        """No question went down with these connections. If the host takes none, the next attempt will say so."""
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)

    def _wait(self, number: int, waiting: Callable[[], object] = lambda: None) -> tuple[Said, Data]:
        since = time.monotonic()
        while number not in self._arrived:
            now = time.monotonic()
            if now < self._patient_until:
                waiting()
            elif now > max(since, self._patient_until) + self._silent_s:
                raise PeerLost(f"node {self.peer.node} ({self.peer.endpoint}) was silent for {self._silent_s:g} s")
            ready = dict(self._poller.poll(int(LOOK_S * 1000)))
            if self._dealer in ready:  # first what had arrived before the end
                since = time.monotonic()
                self._receive()
            elif self._monitor in ready and recv_monitor_message(self._monitor)["event"] & ENDS:
                raise PeerLost(f"node {self.peer.node} ({self.peer.endpoint}) has ended the connection, or takes none")
        said, data = self._arrived.pop(number)
        if said.refused:
            raise PeerLost(f"node {self.peer.node} refused: {said.refused}")
        return said, data

    def _receive(self) -> None:
        first, *rest = self._dealer.recv_multipart(copy=False)
        try:
            said = msgspec.msgpack.decode(first.buffer, type=Said)
        except msgspec.MsgspecError as error:
            raise PeerLost(f"node {self.peer.node} sent what is no answer: {error}") from error
        if said.wait_s:
            self._patient_until = max(self._patient_until, time.monotonic() + said.wait_s)
        elif said.number in self._forgotten:
            self._forgotten.discard(said.number)
        else:
            self._owed.discard(said.number)
            self._arrived[said.number] = said, rest[0].buffer if rest else memoryview(b"")
