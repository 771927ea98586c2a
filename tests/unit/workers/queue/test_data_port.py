"""Data connections are made once the other side has greeted; what answers nothing is given up, on either side."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from membership.base.network import Ports
from tests.support.helpers import eventually
from workers.queue import data_port
from workers.queue.data_port import DataPort, TakeUp
from workers.queue.handle import Offer
from workers.queue.remote_wire import SocketThread
from workers.queue.sealed import SealedSocket, new_keys

pytest.importorskip("cryptography")
pytestmark = pytest.mark.unit
WAIT_S = 30.0


class Side:
    """A thread that looks after its data port and after what it takes up."""

    def __init__(self) -> None:
        self.io = SocketThread("a side of the test")
        self.io.turn_s = 0.01
        self.port = DataPort(self.io, "localhost")
        self.taken: list[TakeUp] = []
        self.made: list[SealedSocket] = []
        self.failed: list[str] = []
        self.io.start(self._turn, {})

    def _turn(self) -> None:
        now = time.monotonic()
        self.port.look(now)
        for each in self.taken:
            each.look(now)

    def take_up(self, offer: Offer) -> None:
        self.io.call(lambda: self.taken.append(TakeUp(self.io, offer, self.made.append, self.failed.append)))

    def close(self) -> None:
        self.io.call(self._close)
        self.io.stop()
        for sealed in self.made:
            sealed.close()

    def _close(self) -> None:
        self.port.close()
        for each in self.taken:
            each.close()


@pytest.fixture
def side() -> Iterator[Side]:
    made = Side()
    yield made
    made.close()


def test_both_sides_have_the_connection_and_nothing_has_passed(side: Side) -> None:
    offer = side.port.offer(side.made.append)
    assert offer is not None
    assert offer.address.startswith("tcp://127.0.0.1:"), "who takes it up asks no name server"
    side.take_up(offer)
    eventually(lambda: len(side.made) == 2, WAIT_S, "both ends")
    one, other = side.made
    one.send(b"hello")
    other.send(b"hello")
    for end in side.made:
        assert eventually(end.take, WAIT_S, "its message") == [(b"hello", [])]
        assert end._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert end._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
    assert side.failed == []


def elsewhere(server: socket.socket) -> Offer:
    return Offer(f"tcp://127.0.0.1:{server.getsockname()[1]}", bytes(16), new_keys())


def test_what_accepts_and_hangs_up_is_no_connection(side: Side) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        side.take_up(elsewhere(server))
        accepted, _ = server.accept()
        assert accepted.recv(16) == bytes(16)
        accepted.close()
        eventually(lambda: side.failed, WAIT_S, "the end")
    assert "ended" in side.failed[0]
    assert side.made == []


def test_what_accepts_and_says_nothing_is_given_up(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_port, "REMOTE_SILENCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        side.take_up(elsewhere(server))
        eventually(lambda: side.failed, WAIT_S, "the deadline")
    assert "did not answer within 0.1 s" in side.failed[0]
    assert side.made == []


def test_a_port_where_nobody_listens_is_not_reached(side: Side) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        offer = elsewhere(server)
    side.take_up(offer)
    eventually(lambda: side.failed, WAIT_S, "the refusal")
    assert "refused" in side.failed[0].lower()


def test_any_free_port_of_a_range_is_taken_and_none_is_no_end() -> None:
    """At an address of this process's own, where no test that runs beside listens."""
    high, low = divmod(os.getpid() % 65_000, 256)
    mine, ports = f"127.2.{high}.{low}", Ports(7400, 7401)
    io = SocketThread("a side of the test")
    made = [DataPort(io, mine, ports) for _ in range(3)]
    offers = [each.offer(lambda sealed: sealed.close()) for each in made]
    assert {offer.address for offer in offers if offer is not None} == {f"tcp://{mine}:7400", f"tcp://{mine}:7401"}
    assert offers[2] is None
    for each in made:
        each.close()
    io.discard()


def test_strangers_that_say_nothing_are_hung_up_on(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_port, "REMOTE_SILENCE_S", 0.05)
    listener = side.port._listener
    assert listener is not None
    with ExitStack() as ends:
        strangers = [ends.enter_context(socket.create_connection(listener.getsockname())) for _ in range(3)]
        for stranger in strangers:
            stranger.settimeout(WAIT_S)
            assert stranger.recv(1) == b""
