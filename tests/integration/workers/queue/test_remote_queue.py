"""Remote readers over ZeroMQ TCP: order, acknowledgement, encryption with a list of keys, reconnects, silence, ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
import zmq

from membership.base.errors import QueueClosed, QueueError, WaitTimeout
from membership.base.network import Network
from tests.support import ROOT
from tests.support.helpers import eventually
from tests.support.ipv6 import needs_ipv6
from workers.bulk.server import BulkServer
from workers.exchange.tcp.transport import TcpTransport
from workers.ipc.handover import HandoverRefused
from workers.queue import remote_reader, remote_writer
from workers.queue.curve import new_keys
from workers.queue.handle import CurveKeys
from workers.queue.message_queue import Handle, MessageQueue, MsgpackCodec, PickleCodec, Remote, SlowReaders
from workers.queue.remote_reader import RemoteReader
from workers.queue.remote_wire import END, ToReader, ToWriter
from workers.queue.remote_writer import CrossHostWriter, RemoteWriter
from workers.queue.sealed import SealedSocket

pytestmark = pytest.mark.integration

OURS, THEIRS, STRANGER = new_keys(), new_keys(), new_keys()


@pytest.fixture
def queue() -> Iterator[MessageQueue]:
    remote = Remote("127.0.0.1", OURS, frozenset([THEIRS.public]))
    with MessageQueue("far", MsgpackCodec(), remote=remote) as made:
        yield made


def elsewhere(writer: MessageQueue, **changes: object) -> Handle:
    """The handle as a process on another host would get it."""
    return msgspec.structs.replace(writer.export_handle(), host="another host", **changes)


def join(handle: Handle, reader_id: str = "far", keys: CurveKeys = THEIRS, timeout_s: float = 10) -> MessageQueue:
    return MessageQueue.create_from_handle(handle, reader_id, timeout_s=timeout_s, keys=keys)


def test_local_and_remote_readers_get_the_same_in_the_same_order(queue: MessageQueue) -> None:
    queue.enqueue("before any reader joined")
    with join(elsewhere(queue)) as far, MessageQueue.create_from_handle(queue.export_handle(), "near") as near:
        queue.wait_until_ready(["far", "near"], 5)
        assert set(queue.readers) == {"far", "near"}
        for number in range(3000):  # more than a window
            assert queue.enqueue({"number": number, "data": bytes(100)}) == 2
            assert near.dequeue(30)["number"] == number
            if number % 500 == 499:
                assert [far.dequeue(30)["number"] for _ in range(500)] == list(range(number - 499, number + 1))
    eventually(lambda: queue.readers == (), 30, "both to have left")


def test_what_arrives_can_be_seen_before_it_is_dequeued(queue: MessageQueue) -> None:
    seen: list[int] = []
    with join(elsewhere(queue)) as far:
        queue.enqueue(0)
        reader = far._reading
        assert isinstance(reader, RemoteReader)
        eventually(lambda: reader.pump() or far.pending(), 30, "the first message")
        far.watch(seen.append)
        assert seen == [0], "what was there already"
        for number in range(1, 100):
            queue.enqueue(number)
        eventually(lambda: reader.pump() or len(seen) == 100, 30, "all messages")
        assert seen == [far.dequeue(30) for _ in range(100)] == list(range(100))
    with (
        MessageQueue.create_from_handle(queue.export_handle(), "near") as near,
        pytest.raises(QueueError, match="this"),
    ):
        near.watch(seen.append)


@needs_ipv6
def test_readers_come_over_ipv6_too() -> None:
    remote = Remote("::1", OURS, frozenset([THEIRS.public]))
    with MessageQueue("far", MsgpackCodec(), remote=remote) as queue, join(elsewhere(queue)) as far:
        assert queue.export_handle().remote.startswith("tcp://[::1]:")
        queue.enqueue("it works")
        assert far.dequeue(30) == "it works"
        queue.shutdown()
        with pytest.raises(QueueClosed):
            far.dequeue(30)


def test_strangers_and_wrong_servers_stay_out(queue: MessageQueue) -> None:
    with pytest.raises(WaitTimeout, match="did not admit us"):
        join(elsewhere(queue), keys=STRANGER, timeout_s=0.5)
    with pytest.raises(WaitTimeout, match="did not admit us"):
        join(elsewhere(queue, remote_key=STRANGER.public), timeout_s=0.5)
    with pytest.raises(HandoverRefused, match="no such queue"):
        join(elsewhere(queue, queue="queue/other/1"))
    plain = zmq.Context()
    socket = plain.socket(zmq.DEALER)
    socket.connect(queue.export_handle().remote)
    socket.send(b"hello")
    assert not socket.poll(300)
    plain.destroy(linger=0)
    assert queue.readers == ()


def test_the_same_id_twice_is_refused_and_pickle_never_crosses(queue: MessageQueue) -> None:
    with join(elsewhere(queue)), pytest.raises(HandoverRefused, match="far has joined already"):
        join(elsewhere(queue))
    with pytest.raises(HandoverRefused, match="only msgpack"):
        MessageQueue.create_from_handle(elsewhere(queue), "x", codec=PickleCodec(), keys=THEIRS)
    with pytest.raises(QueueError, match="only msgpack"):
        MessageQueue("far", remote=Remote("127.0.0.1", OURS, frozenset()))
    with pytest.raises(QueueError, match="another host, and we run without --advertise"):
        MessageQueue.create_from_handle(elsewhere(queue), "x")
    assert "secret" not in repr(OURS)


def test_a_reader_that_does_not_acknowledge_is_named(queue: MessageQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_writer, "WINDOW", 10)
    with join(elsewhere(queue), "lazy") as lazy:
        for number in range(10):
            queue.enqueue(number)
        with pytest.raises(SlowReaders, match="do not acknowledge: lazy") as caught:
            queue.enqueue(10, timeout_s=0.1)
        assert caught.value.readers == ("lazy",)
        timer = threading.Timer(0.1, lazy.dequeue, [5])
        timer.start()
        assert queue.enqueue(10, timeout_s=10) == 1
        timer.join(30)
        assert queue.drop_reader("lazy")
        assert queue.enqueue(11) == 0
        for number in range(1, 10):
            assert lazy.dequeue(30) == number
        with pytest.raises(QueueClosed, match="dropped"):
            assert [lazy.dequeue(30), lazy.dequeue(30)] == [10, "never"]


def test_messages_pass_a_data_connection_and_go_on_without_it(
    queue: MessageQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = queue._writing
    assert isinstance(writer, CrossHostWriter)
    over_zeromq: list[int] = []
    send = RemoteWriter._send

    def sending(writer: RemoteWriter, route: bytes, head: ToReader, data: bytes = b"") -> bool:
        over_zeromq.append(head.number)
        return send(writer, route, head, data)

    monkeypatch.setattr(RemoteWriter, "_send", sending)
    with join(elsewhere(queue)) as far:
        reader, peer = far._reading, writer._remote._peers["far"]
        assert isinstance(reader, RemoteReader)

        def connected() -> bool:
            reader._bell.look()  # as who waits for a message does
            return peer.data is not None and reader._data is not None

        for end in range(100, 400, 100):
            eventually(connected, 30, "a data connection")
            over_zeromq.clear()
            for number in range(end - 100, end):
                queue.enqueue(number)
            assert set(over_zeromq) <= {0}, "heartbeats"
            assert far.dequeue(30) == end - 100
            assert peer.data is not None
            peer.data._socket.shutdown(socket.SHUT_RDWR)  # with messages that are not acknowledged
            queue.enqueue("last")
            assert [far.dequeue(30) for _ in range(100)] == [*range(end - 99, end), "last"]


def test_what_was_dequeued_is_acknowledged_together(queue: MessageQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not each message by itself, nor so late that the window fills up: no heartbeat comes to help here."""
    monkeypatch.setattr(remote_reader, "HEARTBEAT_S", 600.0)
    monkeypatch.setattr(remote_writer, "WINDOW", remote_reader.ACK_MESSAGES + 50)
    monkeypatch.setattr(remote_writer, "WINDOW_BYTES", remote_reader.ACK_BYTES + 5000)
    monkeypatch.setattr(remote_writer, "REMOTE_SILENCE_S", 600.0)
    monkeypatch.setattr(remote_reader, "REMOTE_SILENCE_S", 600.0)
    done: list[int] = []
    take = RemoteWriter._take

    def taking(writer: RemoteWriter, route: bytes, message: ToWriter) -> str:
        done.append(message.done)
        return take(writer, route, message)

    monkeypatch.setattr(RemoteWriter, "_take", taking)
    with join(elsewhere(queue), "far") as far:
        for number in range(4 * remote_reader.ACK_MESSAGES):
            queue.enqueue(number, timeout_s=30)
            assert far.dequeue(30) == number
        assert 3 <= len(set(done)) <= 6, done
        for _ in range(3):
            queue.enqueue(bytes(remote_reader.ACK_BYTES), timeout_s=30)
            assert len(far.dequeue(30)) == remote_reader.ACK_BYTES


def test_readers_learn_of_the_writers_end(queue: MessageQueue) -> None:
    with join(elsewhere(queue)) as far:
        queue.enqueue("last words")
        queue.shutdown()
        assert far.dequeue(30) == "last words"
        with pytest.raises(QueueClosed, match="writer has ended it"):
            far.dequeue(30)


def test_what_is_still_on_its_way_at_the_end_arrives(queue: MessageQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_writer, "LINGER_S", 30.0)
    writer = queue._writing
    assert isinstance(writer, CrossHostWriter)
    with join(elsewhere(queue)) as far:
        reader, peer = far._reading, writer._remote._peers["far"]
        assert isinstance(reader, RemoteReader)
        eventually(lambda: reader._bell.look() or (peer.data and reader._data), 30, "a data connection")
        for number in range(10):
            queue.enqueue(bytes([number]) * (2 << 20))
        assert peer.data is not None
        assert peer.data._unsent, "it is more than the socket takes"
        ending = threading.Thread(target=queue.shutdown)
        ending.start()
        assert [far.dequeue(30)[0] for _ in range(10)] == list(range(10))
        with pytest.raises(QueueClosed, match="writer has ended it"):
            far.dequeue(30)
        ending.join(30)


def test_a_reader_that_does_not_read_takes_no_time_from_the_others_at_the_end(queue: MessageQueue) -> None:
    """And hears which message was the last. The one that reads is the second that the writer knows."""
    writer = queue._writing
    assert isinstance(writer, CrossHostWriter)
    with join(elsewhere(queue), "stuck") as stuck, join(elsewhere(queue), "reads") as reads:
        readers, peers = (stuck._reading, reads._reading), writer._remote._peers
        for reader, peer in zip(readers, peers.values(), strict=True):
            assert isinstance(reader, RemoteReader)
            eventually(lambda r=reader, p=peer: r._bell.look() or (p.data and r._data), 30, "data connections")
        for number in range(10):
            queue.enqueue(bytes([number]) * (2 << 20))
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(lambda: [reads.dequeue(30)[0] for _ in range(10)])
            queue.shutdown()
            assert reading.result(60) == list(range(10))
        with pytest.raises(QueueClosed, match="writer has ended it"):
            reads.dequeue(30)
        with pytest.raises(QueueClosed, match=r"after message 10, of which \d have arrived"):
            deque(iter(partial(stuck.dequeue, 30), None), maxlen=0)


def test_an_end_that_finds_its_data_connection_dead_goes_on_without_it(
    queue: MessageQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the last thing that is sent there, and in the last turn: nothing is sent later that could notice."""
    writer = queue._writing
    assert isinstance(writer, CrossHostWriter)
    send = SealedSocket.send

    def sending(sealed: SealedSocket, head: bytes, buffers: Sequence[memoryview] = ()) -> bool:
        if sealed is data and msgspec.msgpack.decode(head, type=ToReader).number == END:
            raise QueueClosed("its data connection has ended")
        return send(sealed, head, buffers)

    io, held = writer._remote._io, threading.Event()

    def turn_before_the_last() -> None:
        turn()
        held.set()
        eventually(lambda: io.stopping, 30, "the end")

    with join(elsewhere(queue)) as far:
        reader, peer = far._reading, writer._remote._peers["far"]
        assert isinstance(reader, RemoteReader)
        eventually(lambda: reader._bell.look() or (peer.data and reader._data), 30, "a data connection")
        data = peer.data
        monkeypatch.setattr(SealedSocket, "send", sending)
        queue.enqueue("last words")
        turn = io._turn
        monkeypatch.setattr(io, "_turn", turn_before_the_last)
        io.wake()
        assert held.wait(30)
        queue.shutdown()
        assert far.dequeue(30) == "last words"
        with pytest.raises(QueueClosed, match="writer has ended it"):
            far.dequeue(30)


@pytest.mark.parametrize("ended", [True, False])
def test_a_reader_takes_leave_of_a_writer_that_is_there_and_waits_for_no_other(
    ended: bool, queue: MessageQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host's ranks die together, and who leaves them has others to join."""
    lingers: list[int] = []
    destroy = zmq.Context.destroy

    def destroying(context: zmq.Context[Any], linger: float | None = None) -> None:
        if context is reader._io.context:
            lingers.append(reader._dealer.linger)
        destroy(context, linger)

    with join(elsewhere(queue)) as far:
        reader = far._reading
        assert isinstance(reader, RemoteReader)
        if ended:
            queue.shutdown()
            with pytest.raises(QueueClosed):
                far.dequeue(30)
        monkeypatch.setattr(zmq.Context, "destroy", destroying)
        far.shutdown()
    assert lingers == [0 if ended else 1000 * remote_reader.LEAVE_S]
    if not ended:
        eventually(lambda: queue.readers == (), 30, "it to have left")


def test_an_end_that_has_overtaken_messages_waits_for_them(queue: MessageQueue) -> None:
    with join(elsewhere(queue)) as far:
        reader = far._reading
        assert isinstance(reader, RemoteReader)
        reader._arrived(ToReader(END, 2), b"")
        for number in (1, 2):
            assert not far._reading.pending()
            queue.enqueue(number)
            assert far.dequeue(30) == number
        with pytest.raises(QueueClosed, match="writer has ended it"):
            far.dequeue(30)


def test_an_end_without_the_last_messages_is_told_from_a_whole_one(
    queue: MessageQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    transmit = RemoteWriter._transmit

    def losing(writer: RemoteWriter, peer: remote_writer._Peer, number: int, data: bytes) -> bool:
        return number == 2 or transmit(writer, peer, number, data)

    monkeypatch.setattr(RemoteWriter, "_transmit", losing)
    with join(elsewhere(queue)) as far:
        queue.enqueue("arrives")
        queue.enqueue("does not")
        queue.shutdown()
        assert far.dequeue(30) == "arrives"
        with pytest.raises(QueueClosed, match="ended after message 2, of which 1 have arrived"):
            far.dequeue(30)


def test_nothing_is_taken_once_the_queue_has_ended(queue: MessageQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any reader on this host: it is the other hosts' half that refuses."""
    monkeypatch.setattr(remote_writer, "WINDOW", 1)
    with join(elsewhere(queue)):
        queue.enqueue("fills the window")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(queue.enqueue, "waits for room", 30)
            eventually(lambda: queue._writing._remote._one_sender.locked(), 30, "the wait")  # type: ignore[union-attr]
            queue.shutdown()
            with pytest.raises(QueueClosed, match="shut down"):
                waiting.result(30)
        with pytest.raises(QueueClosed, match="shut down"):
            queue.enqueue("too late")


def test_a_killed_reader_is_forgotten(queue: MessageQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys, msgspec\nfrom workers.queue.message_queue import *\nfrom workers.queue.remote_reader import *\n"
        "handle = msgspec.structs.replace(Handle.decode(bytes.fromhex(sys.argv[1])), host='another host')\n"
        "keys = CurveKeys(*(a.encode() for a in sys.argv[2:4]))\n"
        "queue = MessageQueue.create_from_handle(handle, 'dies', keys=keys)\nprint(queue.dequeue(30), flush=True)\n"
        "queue.dequeue(60)\n"
    )
    arguments = [queue.export_handle().encode().hex(), THEIRS.public.decode(), THEIRS.secret.decode()]
    reader = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        queue.wait_until_ready(["dies"], 20)
        queue.enqueue("hello")
        assert reader.stdout is not None
        assert reader.stdout.readline() == "hello\n"
        monkeypatch.setattr(remote_writer, "REMOTE_SILENCE_S", 1.5)
    finally:
        reader.kill()
        reader.communicate(timeout=30)
    eventually(lambda: queue.readers == (), 30, "the silent reader to be forgotten")


def test_a_reader_that_is_killed_with_messages_on_their_way_ends_none_of_the_others(queue: MessageQueue) -> None:
    script = (
        "import sys, threading, msgspec\nfrom workers.queue.message_queue import *\n"
        "handle = msgspec.structs.replace(Handle.decode(bytes.fromhex(sys.argv[1])), host='another host')\n"
        "keys = CurveKeys(*(a.encode() for a in sys.argv[2:4]))\n"
        "queue = MessageQueue.create_from_handle(handle, 'dies', keys=keys)\nprint('in', flush=True)\n"
        "threading.Event().wait()\n"
    )
    writer = queue._writing
    assert isinstance(writer, CrossHostWriter)
    arguments = [queue.export_handle().encode().hex(), THEIRS.public.decode(), THEIRS.secret.decode()]
    reader = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "in\n"
        peer = writer._remote._peers["dies"]
        eventually(lambda: peer.data is not None, 30, "its data connection")
        for _ in range(10):
            queue.enqueue(bytes(2 << 20))
        assert peer.data is not None
        assert peer.data._unsent, "it is more than the socket takes"
    finally:
        reader.kill()
        reader.communicate(timeout=30)
    eventually(lambda: peer.data is None, 30, "the end of its data connection")
    with join(elsewhere(queue), "lives") as lives:
        queue.enqueue("to those that live")
        assert lives.dequeue(30) == "to those that live"


def test_a_killed_writer_is_known_long_before_it_counts_as_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_reader, "REMOTE_SILENCE_S", 1e6)
    script = (
        "import sys, threading\nfrom workers.queue.message_queue import *\n"
        "ours = CurveKeys(*(a.encode() for a in sys.argv[1:3]))\n"
        "remote = Remote('127.0.0.1', ours, frozenset([sys.argv[3].encode()]))\n"
        "queue = MessageQueue('dies', MsgpackCodec(), remote=remote)\n"
        "print(queue.export_handle().encode().hex(), flush=True)\nqueue.wait_until_ready(['far'], 60)\n"
        "queue.enqueue('last words')\nthreading.Event().wait()\n"
    )
    arguments = [OURS.public.decode(), OURS.secret.decode(), THEIRS.public.decode()]
    writer = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert writer.stdout is not None
        handle = Handle.decode(bytes.fromhex(writer.stdout.readline()))
        with join(msgspec.structs.replace(handle, host="another host")) as far:
            assert far.dequeue(30) == "last words"
            writer.kill()
            with pytest.raises(QueueClosed, match="its writer's process has ended"):
                far.dequeue(30)
    finally:
        writer.kill()
        writer.communicate(timeout=30)


def test_what_a_broken_connection_lost_is_sent_again_once_and_in_order(queue: MessageQueue) -> None:
    with join(elsewhere(queue)) as far:
        reader = far._end
        queue.enqueue(0)
        assert far.dequeue(30) == 0
        for turn in range(5):
            reader._io.call(lambda: reader._dealer.disconnect(reader._handle.remote))  # type: ignore[union-attr]
            for number in range(20):
                queue.enqueue(turn * 20 + number)
            reader._io.call(lambda: reader._dealer.connect(reader._handle.remote))  # type: ignore[union-attr]
            assert [far.dequeue(30) for _ in range(20)] == list(range(turn * 20, turn * 20 + 20))


@pytest.mark.parametrize("thread", ["queue-remote-reader", "queue-remote-writer", "exchange-tcp", "bulk-server"])
def test_what_finds_no_thread_for_its_sockets_keeps_none(
    thread: str, queue: MessageQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again, maybe for ever."""
    remote = Remote("127.0.0.1", OURS, frozenset([THEIRS.public]))
    network = Network("127.0.0.1", "moe", b"a secret of the tests' cluster")
    make: dict[str, Callable[[], object]] = {
        "queue-remote-reader": lambda: join(elsewhere(queue, remote="tcp://127.0.0.1:1")),  # its other end is not ours
        "queue-remote-writer": lambda: MessageQueue("another", MsgpackCodec(), remote=remote),
        "exchange-tcp": lambda: TcpTransport(Mock(), network),
        "bulk-server": lambda: BulkServer(remote, Mock()),
    }
    start = threading.Thread.start

    def short(started: threading.Thread) -> None:
        if started.name == thread:
            raise RuntimeError("can't start new thread")
        start(started)

    def attempt() -> int:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            make[thread]()
        return len(os.listdir("/proc/self/fd"))

    monkeypatch.setattr(threading.Thread, "start", short)
    before = attempt()
    assert [attempt() for _ in range(3)] == [before] * 3


def test_silence_ends_a_reader(queue: MessageQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    with join(elsewhere(queue)) as far:
        monkeypatch.setattr(remote_reader, "REMOTE_SILENCE_S", 0.0)
        with pytest.raises(QueueClosed, match="silent"):
            far.dequeue(30)
    assert remote_writer.REMOTE_SILENCE_S == 5.0
