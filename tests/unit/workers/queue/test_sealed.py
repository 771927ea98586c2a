"""Sealed sockets: whole messages in order, whatever the socket takes at once; nothing that the peer has not sealed."""

from __future__ import annotations

import errno
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from membership.base.errors import QueueClosed
from tests.support.helpers import eventually
from workers.queue.sealed import INLINE, KEY_BYTES, RECORD, TAG_BYTES, Message, SealedSocket, drain, new_keys

pytest.importorskip("cryptography")
pytestmark = pytest.mark.unit
Pair = tuple[SealedSocket, SealedSocket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    keys = new_keys()
    connecting, listening = tcp_pair()
    near, far = SealedSocket(connecting, keys, connects=True), SealedSocket(listening, keys, connects=False)
    yield near, far
    near.close()
    far.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connecting = socket.create_connection(server.getsockname())
        return connecting, server.accept()[0]


def received(far: SealedSocket, count: int, near: SealedSocket | None = None) -> list[Message]:
    """So many messages; what `near` could not send at once is sent meanwhile."""
    found: list[Message] = []
    while len(found) < count:
        found += far.take()
        if near is not None:
            near.flush()
    return found


def test_connections_are_drained_together() -> None:
    """One whose other side reads nothing takes no time from the others, nor does one that has ended."""
    made = [tcp_pair() for _ in range(3)]
    keys, size = new_keys(), 8 << 20
    ends = {
        n: SealedSocket(near, keys, connects=True)
        for n, (near, _) in zip(("stuck", "gone", "reads"), made, strict=True)
    }
    reader = SealedSocket(made[2][1], keys, connects=False)
    for near in ends.values():
        assert not near.send(b"", [memoryview(bytes(size))]), "it is more than the socket takes"
    made[1][1].close()
    thread = threading.Thread(target=received, args=(reader, 1))
    thread.start()
    assert drain(ends, 0.5) == ({"stuck"}, {"gone"})
    thread.join(30.0)
    for each in (*ends.values(), reader, made[0][1]):
        each.close()


@pytest.mark.parametrize("sizes", [(), (0,), (5, 0, 7), (INLINE, 1), (RECORD, RECORD + 1), (3 << 20, 9)])
def test_a_message_arrives_whole_in_its_parts(pair: Pair, sizes: tuple[int, ...]) -> None:
    near, far = pair
    parts = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    for head in (b"one", b"", b"three"):
        near.send(head, [memoryview(part) for part in parts])
        (found,) = received(far, 1, near)
        assert found[0] == head
        assert [bytes(part) for part in found[1]] == parts
    far.send(b"back", [])
    assert received(near, 1) == [(b"back", [])]


def test_what_the_socket_does_not_take_is_sent_later_and_in_order(pair: Pair) -> None:
    near, far = pair
    blobs = [bytes([number]) * (1 << 20) for number in range(16)]
    whole = [near.send(b"%d" % number, [memoryview(blob)]) for number, blob in enumerate(blobs)]
    assert not all(whole), "more than a socket holds"
    found = received(far, len(blobs), near)
    assert [head for head, _ in found] == [b"%d" % number for number in range(len(blobs))]
    assert [bytes(parts[0]) for _, parts in found] == blobs


def test_threads_may_send_at_once(pair: Pair) -> None:
    near, far = pair
    threads = [threading.Thread(target=lambda: [near.send(b"x", [memoryview(bytes(9000))]) for _ in range(20)])]
    threads += [threading.Thread(target=lambda: [near.send(b"y") for _ in range(20)])]
    for thread in threads:
        thread.start()
    found = received(far, 40, near)
    for thread in threads:
        thread.join(10)
    assert sorted(head for head, _ in found) == [b"x"] * 20 + [b"y"] * 20


def relayed(changed: bytes | None) -> SealedSocket:
    """The end of a connection over which came one message, with its bytes changed: None: twice the same."""
    keys = new_keys()
    connecting, tapped = tcp_pair()
    near = SealedSocket(connecting, keys, connects=True)
    near.send(b"pay 1 token")
    data = tapped.recv(1 << 16)
    data = data + data if changed is None else changed + data[len(changed) :]
    to_far, at_far = tcp_pair()
    to_far.sendall(data)
    to_far.close()
    near.close()
    tapped.close()
    return SealedSocket(at_far, keys, connects=False)


@pytest.mark.parametrize("changed", [None, b"\x1b\0\0\0\0\0\0\0\0\0\0\0", b"\xff\xff\xff\xff", b"\1\0\0\0"])
def test_what_the_peer_did_not_seal_ends_the_connection(changed: bytes | None) -> None:
    far = relayed(changed)
    with pytest.raises(QueueClosed, match="record"):
        received(far, 2)
    far.close()


def test_each_direction_has_a_key_of_its_own() -> None:
    keys = new_keys()
    assert keys[:KEY_BYTES] != keys[KEY_BYTES:]
    ours, theirs = tcp_pair()
    near, mirror = SealedSocket(ours, keys, connects=True), SealedSocket(theirs, keys, connects=True)
    near.send(b"mirrored")
    with pytest.raises(QueueClosed, match="not sealed by our peer"):
        received(mirror, 1)


def test_what_arrived_before_a_reset_is_not_lost() -> None:
    keys = new_keys()
    connecting, listening = tcp_pair()
    near, far = SealedSocket(connecting, keys, connects=True), SealedSocket(listening, keys, connects=False)
    near.send(b"last words")
    far._in = memoryview(bytearray(4 + 8 + 10 + TAG_BYTES))  # it is full after the message: one look, two reads
    eventually(lambda: select.select([listening], [], [], 0)[0], 30, "the message")

    class Reset:
        """The connection, which is reset once that was read. A kernel says so once."""

        def __init__(self) -> None:
            self.reads = 0

        def recv_into(self, room: memoryview) -> int:
            self.reads += 1
            if self.reads == 2:
                raise ConnectionResetError(errno.ECONNRESET, "reset by peer")
            return listening.recv_into(room) if self.reads == 1 else 0

    far._socket = Reset()  # type: ignore[assignment]
    assert far.take() == [(b"last words", [])]
    with pytest.raises(QueueClosed, match="reset by peer"):
        far.take()
    near.close()
    listening.close()


@pytest.mark.parametrize("first", [b"", b"1234567", (2**31).to_bytes(4, "little") * 2, bytes(4) + b"\1\0\0\0"])
def test_a_sealed_record_that_is_no_message_ends_the_connection(pair: Pair, first: bytes) -> None:
    """Whoever takes it in catches QueueClosed, and no other error."""
    near, far = pair
    near._put(first)
    near._push()
    with pytest.raises(QueueClosed, match="first record"):
        received(far, 1)


def test_the_end_of_either_side_is_seen(pair: Pair) -> None:
    near, far = pair
    near.send(b"last words")
    near.close()
    assert received(far, 1) == [(b"last words", [])]
    with pytest.raises(QueueClosed, match="ended"):
        received(far, 1)
    with pytest.raises(QueueClosed, match="closed"):
        near.send(b"more")
