"""The engine's ZeroMQ door, with real sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import zmq

from elastic.engine.gateway_server import EngineServer
from elastic.protocol import Abort, Hello, Outputs, Rejected, Submit, ToGateway, Tokens, Welcome
from membership.base.network import Network
from membership.base.run_dir import ENV
from tests.support.helpers import eventually, let_all_in
from workers.protocol.messages import Sampling
from workers.queue.curve import use_curve
from workers.queue.handle import CurveKeys
from workers.queue.network import Purpose, connecting_keys, listening_keys

pytestmark = pytest.mark.integration
TOKEN = 42
NETWORK = Network("127.0.0.1", "moe", b"a secret of the tests' cluster")


class Peer:
    """A gateway's socket."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: tuple[CurveKeys, bytes] | None = None
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        if keys is not None:
            use_curve(self.socket, *keys)
        self.socket.connect(address)

    def send(self, message: object) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> ToGateway:
        assert self.socket.poll(5000), "nothing came"
        return msgspec.msgpack.decode(self.socket.recv(), type=ToGateway)  # type: ignore[no-any-return]


@pytest.fixture
def rung() -> threading.Event:
    return threading.Event()


@pytest.fixture
def server(rung: threading.Event) -> Iterator[EngineServer]:
    server = EngineServer(rung.set)
    yield server
    server.close()


@pytest.fixture
def between(rung: threading.Event) -> Iterator[EngineServer]:
    """It also listens for other hosts."""
    server = EngineServer(rung.set, NETWORK)
    yield server
    server.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(0)


def submit(name: str) -> Submit:
    return Submit(name, [1, 2], Sampling(), 5)


def taken(server: EngineServer) -> list[Submit | Abort]:
    return eventually(server.take, 30.0, "a message for the engine")


def submit_unseen(peer: Peer, rung: threading.Event) -> None:
    """Submit "a". It is there, and the engine has not taken it."""
    rung.clear()
    peer.send(submit("a"))
    assert rung.wait(30.0), "the submission did not arrive"


def found_lost(server: EngineServer, index: int) -> list[Submit | Abort]:
    """What it finds out by sending tokens to a gateway that has gone."""

    def sent() -> list[Submit | Abort]:
        server.send([Tokens(TOKEN, "a", index, [7])])
        return server.take()

    return eventually(sent, 30.0, "the abort of the lost gateway's request")


def test_hello_before_serving_is_welcomed_with_the_token(
    server: EngineServer, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    peer = Peer(context, server.address)
    peer.send(Hello("g"))
    server.serve(TOKEN)
    assert peer.receive() == Welcome(TOKEN)


def test_outputs_go_to_the_gateway_that_submitted_last(
    server: EngineServer, context: zmq.Context[zmq.Socket[bytes]], rung: threading.Event
) -> None:
    server.serve(TOKEN)
    first, second = Peer(context, server.address), Peer(context, server.address)
    first.send(submit("a"))
    assert taken(server) == [submit("a")]
    assert rung.is_set()
    second.send(submit("a"))
    assert taken(server) == [submit("a")]
    first.send(Abort("a"))  # not its request any more
    first.send(submit("b"))
    assert taken(server) == [submit("b")]
    server.send([Tokens(TOKEN, "a", 0, [7]), Rejected(TOKEN, "b", 503, "no", 1.0)])
    assert second.receive() == Tokens(TOKEN, "a", 0, [7])
    assert first.receive() == Rejected(TOKEN, "b", 503, "no", 1.0)


def test_a_gateway_that_takes_outputs_together_gets_those_of_a_step_in_one_message(
    server: EngineServer, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    server.serve(TOKEN)
    new, old = Peer(context, server.address), Peer(context, server.address)
    for name, peer in (("a", new), ("b", old), ("c", new), ("d", old)):
        peer.send(msgspec.structs.replace(submit(name), together=peer is new))
        taken(server)
    a, b, c, d = (Tokens(TOKEN, name, 0, [7]) for name in "abcd")
    refused = Rejected(TOKEN, "c", 503, "no")
    server.send([a, b, c, d, refused])
    assert [new.receive(), old.receive(), old.receive()] == [Outputs(TOKEN, [a, c, refused]), b, d]
    server.send([a])
    assert new.receive() == a


def test_of_outputs_together_that_cannot_be_sent_each_request_is_aborted(
    server: EngineServer,
    context: zmq.Context[zmq.Socket[bytes]],
    rung: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.serve(TOKEN)
    peer = Peer(context, server.address)
    for name in "abc":
        peer.send(msgspec.structs.replace(submit(name), together=True))
        taken(server)
    with monkeypatch.context() as full:
        full.setattr(server, "_send_to", lambda *_: False)
        server.send([*(Tokens(TOKEN, name, 0, [7]) for name in "ab"), Tokens(TOKEN, "c", 0, [7], finish_reason="stop")])
        found: list[Submit | Abort] = []
        eventually(lambda: found.extend(server.take()) or len(found) == 2, 30.0, "the aborts of what goes on")
    assert found == [Abort("a"), Abort("b")]


def test_what_an_earlier_submission_gave_does_not_go_where_the_next_one_came_from(
    server: EngineServer, context: zmq.Context[zmq.Socket[bytes]], rung: threading.Event
) -> None:
    """A gateway has connected anew: of tokens that were lost with its old connection, it would see a gap."""
    server.serve(TOKEN)
    old, new = Peer(context, server.address), Peer(context, server.address)
    old.send(submit("a"))
    assert taken(server) == [submit("a")]
    submit_unseen(new, rung)
    server.send([Tokens(TOKEN, "a", 7, [7], finish_reason="length")])
    assert old.receive() == Tokens(TOKEN, "a", 7, [7], finish_reason="length")
    assert taken(server) == [submit("a")]
    server.send([Tokens(TOKEN, "a", 0, [5])])
    assert new.receive() == Tokens(TOKEN, "a", 0, [5])


def test_what_cannot_be_sent_for_an_earlier_submission_does_not_end_the_next_one(
    server: EngineServer,
    context: zmq.Context[zmq.Socket[bytes]],
    rung: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gateway that reads slowly has lost a token, and asks again over the same connection."""
    server.serve(TOKEN)
    peer = Peer(context, server.address)
    peer.send(submit("a"))
    assert taken(server) == [submit("a")]
    submit_unseen(peer, rung)
    rung.clear()
    with monkeypatch.context() as full:
        full.setattr(server, "_send_to", lambda *_: False)
        server.send([Tokens(TOKEN, "a", 7, [7])])
        assert rung.wait(30.0)
    assert taken(server) == [submit("a")]
    server.send([Tokens(TOKEN, "a", 0, [5])])
    assert peer.receive() == Tokens(TOKEN, "a", 0, [5])


def test_malformed_messages_are_dropped(server: EngineServer, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    server.serve(TOKEN)
    peer = Peer(context, server.address)
    for bad in (b"", b"\xc1", msgspec.msgpack.encode(["Submit", 1]), msgspec.msgpack.encode(Welcome(1))):
        peer.socket.send(bad)
    peer.socket.send_multipart([b"a", b"b", b"c"])
    peer.send(submit("good"))
    assert taken(server) == [submit("good")]


def test_the_requests_of_a_gateway_that_is_gone_are_aborted(
    server: EngineServer, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    server.serve(TOKEN)
    peer = Peer(context, server.address)
    peer.send(submit("a"))
    assert taken(server) == [submit("a")]
    peer.socket.close()

    assert found_lost(server, 0) == [Abort("a")]


def test_gateways_of_both_kinds_get_the_same(between: EngineServer, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    keys = connecting_keys(NETWORK, Purpose.GATEWAYS), between.remote_key
    assert between.remote_key == listening_keys(NETWORK, Purpose.GATEWAYS).public
    far, near = Peer(context, between.remote, keys), Peer(context, between.address)
    far.send(Hello("g"))  # before it serves
    between.serve(TOKEN)
    assert far.receive() == Welcome(TOKEN)
    far.send(submit("a"))
    assert taken(between) == [submit("a")]
    near.send(Abort("a"))  # not its request
    near.send(submit("b"))
    assert taken(between) == [submit("b")]
    between.send([Tokens(TOKEN, "a", 0, [7]), Tokens(TOKEN, "b", 0, [8])])
    assert (far.receive(), near.receive()) == (Tokens(TOKEN, "a", 0, [7]), Tokens(TOKEN, "b", 0, [8]))
    far.socket.close()

    assert found_lost(between, 1) == [Abort("a")]


def test_who_has_no_secret_is_not_answered(between: EngineServer, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    between.serve(TOKEN)
    other = replace(NETWORK, secret=b"another secret, no less long")
    strangers = [
        Peer(context, between.remote),
        Peer(context, between.remote, (connecting_keys(other, Purpose.GATEWAYS), between.remote_key)),
        Peer(context, between.remote, (connecting_keys(NETWORK), between.remote_key)),  # a rank's
    ]
    for each in strangers:
        each.send(Hello("g"))
        each.send(submit("stolen"))
    ours = Peer(context, between.remote, (connecting_keys(NETWORK, Purpose.GATEWAYS), between.remote_key))
    ours.send(submit("ours"))
    assert taken(between) == [submit("ours")]
    assert not any(each.socket.poll(200) for each in strangers)
    assert between.take() == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_other_users_are_not_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where they can reach the socket, because its directory is open by mistake."""
    monkeypatch.setenv(ENV, str(tmp_path / "run"))
    server = EngineServer(lambda: None)
    server.serve(TOKEN)
    let_all_in(Path(server.address.removeprefix("ipc://")))
    script = "import os, sys, zmq; os.setuid(65534); s = zmq.Context().socket(zmq.DEALER); s.connect(sys.argv[1]);"
    script += "s.send(bytes.fromhex(sys.argv[2])); print(s.poll(500)); s.close(0)"
    hello = msgspec.msgpack.encode(Hello("stranger")).hex()
    stranger = subprocess.run(
        [sys.executable, "-c", script, server.address, hello], capture_output=True, text=True, timeout=20, check=True
    )
    assert stranger.stdout.strip() == "0", "a stranger got an answer"
    server.close()
    assert list((tmp_path / "run").iterdir()) == []
