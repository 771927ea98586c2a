"""The ways to send a message to N processes and get replies that benchmarks/mq.py compares: ours, pipe, ZeroMQ, futex.

Each has a parent's side (`send` to all, `receive` all answers) and a peer's side (`main`, run as a process of its own
by `python -m benchmarks.mq_transports NAME ...`). A peer answers each message with 200 bytes; `hold`s nothing.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection, Pipe
from typing import Any, Protocol

import zmq

from benchmarks.futexes import futex_wait, futex_wake
from workers.ipc.doorbell import Doorbell
from workers.ipc.shared_memory import Segment
from workers.queue.message_queue import Handle, MessageQueue

ANSWER = bytes(200)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def start_peer(name: str, *arguments: object, fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    """A peer process."""
    command = [sys.executable, "-m", "benchmarks.mq_transports", name, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=fds, cwd=ROOT, encoding="utf-8")


class Transport(Protocol):
    """The parent's side. `carries` says whether it can carry payloads."""

    name: str
    carries: bool
    peers: list[subprocess.Popen[str]]

    def send(self, message: Any) -> None:
        """To all peers."""

    def receive(self) -> None:
        """All answers."""

    def close(self) -> None:
        """End peers and files."""


def end(peers: list[subprocess.Popen[str]]) -> None:
    """Kill and reap."""
    for peer in peers:
        peer.kill()
    for peer in peers:
        peer.communicate(timeout=10)


class Ours:
    """MessageQueue: one broadcast queue, one queue of answers per peer, one doorbell for all of them."""

    name, carries = "ours", True

    def __init__(self, count: int) -> None:
        self.queue = MessageQueue("bench")
        exported = self.queue.export_handle().encode().hex()
        self.peers = [start_peer(self.name, exported, number) for number in range(count)]
        self.bell = Doorbell()
        handles = [Handle.decode(bytes.fromhex(line(peer))) for peer in self.peers]
        self.addresses = [handle.address for handle in handles]
        self.answers = [MessageQueue.create_from_handle(handle, "parent", self.bell, 30) for handle in handles]
        self.queue.wait_until_ready(map(str, range(count)), 30)

    def send(self, message: Any) -> None:
        self.queue.enqueue(message)

    def receive(self) -> None:
        for answers in self.answers:
            answers.dequeue(30)

    def close(self) -> None:
        end(self.peers)
        for queue in (*self.answers, self.queue):
            queue.shutdown()
        self.bell.close()

    @staticmethod
    def main(handle: str, number: str) -> None:
        with MessageQueue("answers") as answers:
            print(answers.export_handle().encode().hex(), flush=True)
            with MessageQueue.create_from_handle(bytes.fromhex(handle), number, timeout_s=30) as queue:
                answers.wait_until_ready(["parent"], 30)
                while True:
                    queue.dequeue(3600)
                    answers.enqueue(ANSWER)


class OfPipes:
    """multiprocessing.Pipe, one per peer. Raw bytes go as they are; other objects are pickled for each peer."""

    name, carries = "pipe", True

    def __init__(self, count: int) -> None:
        self.pipes: list[Connection[Any, Any]] = []
        self.peers = []
        for _ in range(count):
            ours, theirs = Pipe()
            self.peers.append(start_peer(self.name, theirs.fileno(), fds=(theirs.fileno(),)))
            theirs.close()
            self.pipes.append(ours)

    def send(self, message: Any) -> None:
        if isinstance(message, dict):
            for pipe in self.pipes:
                pipe.send(message)
        else:
            for pipe in self.pipes:
                pipe.send_bytes(message)

    def receive(self) -> None:
        for pipe in self.pipes:
            pipe.recv_bytes()

    def close(self) -> None:
        end(self.peers)
        for pipe in self.pipes:
            pipe.close()

    @staticmethod
    def main(fd: str) -> None:
        pipe: Connection[Any, Any] = Connection(int(fd))
        while True:
            data = pipe.recv_bytes()
            if data[:1] == b"\x80":
                import pickle

                pickle.loads(data)
            pipe.send_bytes(ANSWER)


class OfZeroMQ:
    """ZeroMQ over its Unix sockets, one pair of sockets per peer."""

    name, carries = "zmq", True

    def __init__(self, count: int) -> None:
        self.context = zmq.Context()
        self.sockets = []
        self.peers = []
        for _ in range(count):
            address = f"ipc://@elastic-ep-bench-{secrets.token_hex(8)}"
            socket = self.context.socket(zmq.PAIR)
            socket.linger = 0
            socket.bind(address)
            self.sockets.append(socket)
            self.peers.append(start_peer(self.name, address))

    def send(self, message: Any) -> None:
        for socket in self.sockets:
            if isinstance(message, dict):
                socket.send_pyobj(message, protocol=5)
            else:
                socket.send(message, copy=len(memoryview(message)) < 65536)

    def receive(self) -> None:
        for socket in self.sockets:
            socket.recv()

    def close(self) -> None:
        end(self.peers)
        self.context.destroy(linger=0)

    @staticmethod
    def main(address: str) -> None:
        socket = zmq.Context().socket(zmq.PAIR)
        socket.connect(address)
        while True:
            data = socket.recv(copy=False).buffer
            if data[:1] == b"\x80":
                import pickle

                pickle.loads(data)
            socket.send(ANSWER)


class BareFutex:
    """One futex word wakes all peers, one per peer answers: the least that two Python processes can do. No payload."""

    name, carries = "futex", False

    def __init__(self, count: int) -> None:
        self.count = count
        self.segment = Segment.create(4096)
        self.words = self.segment.view(format="I")
        fd = self.segment.fileno()
        self.peers = [start_peer(self.name, fd, number, fds=(fd,)) for number in range(count)]

    def send(self, message: Any) -> None:
        self.words[0] += 1
        futex_wake(self.segment.address)

    def receive(self) -> None:
        expected = self.words[0]
        for word in range(16, 16 * (self.count + 1), 16):
            while (seen := self.words[word]) != expected:
                futex_wait(self.segment.address + 4 * word, seen, 5.0)

    def close(self) -> None:
        end(self.peers)
        self.segment.close()

    @staticmethod
    def main(fd: str, number: str) -> None:
        segment = Segment.attach(int(fd))
        words, word = segment.view(format="I"), 16 * (int(number) + 1)
        while True:
            seen = words[word]
            while words[0] == seen:
                futex_wait(segment.address, seen, 5.0)
            words[word] = words[0]
            futex_wake(segment.address + 4 * word)


def line(peer: subprocess.Popen[str]) -> str:
    """The next line a peer prints."""
    if peer.stdout is None:
        raise RuntimeError("peer without stdout")
    return peer.stdout.readline().strip()


ALL: tuple[Callable[[int], Transport], ...] = (Ours, OfPipes, OfZeroMQ, BareFutex)
MAINS: dict[str, Callable[..., None]] = {t.name: t.main for t in (Ours, OfPipes, OfZeroMQ, BareFutex)}


class Fleet:
    """All transports with `count` peers each, warmed up."""

    def __init__(self, count: int) -> None:
        self.count = count
        with ExitStack() as undo:
            self.transports: list[Transport] = []
            for make in ALL:
                self.transports.append(make(count))
                undo.callback(self.transports[-1].close)
            for transport in self.transports:
                for _ in range(200):
                    transport.send(ANSWER)
                    transport.receive()
            self._undo = undo.pop_all()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()


if __name__ == "__main__":
    MAINS[sys.argv[1]](*sys.argv[2:])
