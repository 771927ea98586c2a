"""What both ends of a remote queue share: their messages, and the thread that owns the sockets."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import msgspec
import zmq

from membership.base.attempts import Attempts
from membership.base.errors import WaitTimeout
from workers.queue.handle import Offer
from workers.queue.writer import STOP_TIMEOUT_S

HEARTBEAT_S = 1.0
LINGER_S = 0.5  # at an end: for what is still to be sent
END = 2**62  # number of the message that ends the queue


class _Descriptor(Protocol):
    def fileno(self) -> int:
        """Of a socket that is not ZeroMQ's."""


Pollable = zmq.Socket[Any] | _Descriptor


class ToWriter(msgspec.Struct, frozen=True, array_like=True):
    """The only message of a reader, at least every HEARTBEAT_S: what it has received, and what was dequeued."""

    queue: str
    reader_id: str
    session: bytes  # of this reader object: a second one with the same id is refused
    joined: bool
    received: int
    done: int
    leaving: bool = False
    data: bool = False  # it has no data connection, and takes up an offer


class ToReader(msgspec.Struct, frozen=True, array_like=True):
    """Precedes each payload. Number 0 has none and is a heartbeat, with the number where the reader starts; so has END,
    with that of the last message.
    """

    number: int
    start: int = 0
    refused: str = ""
    offer: Offer | None = None  # of a data connection, for what is to come


class SocketThread:
    """A thread that owns a ZeroMQ context and sockets; others wake it by an eventfd."""

    def __init__(self, name: str, linger_s: float = LINGER_S) -> None:
        self.context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self.context.setsockopt(zmq.LINGER, int(linger_s * 1000))
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(self._wake, zmq.POLLIN)
        self._actions: dict[Any, dict[int, Callable[[], None]]] = {}  # of a ZeroMQ socket, or of a descriptor
        self._calls: deque[Callable[[], object]] = deque()
        self.stopping = False
        self.turn_s = HEARTBEAT_S / 4
        self._attempts = Attempts(name)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, turn: Callable[[], None], sockets: dict[zmq.Socket[Any], Callable[[], None]]) -> None:
        """Call `turn` after every wake and at least every `turn_s`, and actions for readable sockets."""
        self._turn = turn
        for socket, action in sockets.items():
            self.watch(socket, action)
        self.wake()  # the first turn is due now
        self._thread.start()

    def watch(self, socket: Pollable, action: Callable[[], None], event: int = zmq.POLLIN) -> None:
        """Call `action` when `socket` is readable, until it raises zmq.Again; or, once, when it is writable.

        Once started, only in the thread.
        """
        actions = self._actions.setdefault(_key(socket), {})
        actions[event] = action
        self._poller.register(_key(socket), sum(actions))

    def unwatch(self, socket: Pollable, event: int = zmq.POLLIN) -> None:
        """The opposite; only in the thread, before `socket` is closed. Nothing happens if it was not watched."""
        actions = self._actions.get(_key(socket), {})
        if actions.pop(event, None) is None:
            return
        if actions:
            self._poller.register(_key(socket), sum(actions))
        else:
            self._poller.unregister(_key(socket))
            del self._actions[_key(socket)]

    def forget(self, socket: Pollable) -> None:
        """`unwatch` whatever it was watched for."""
        for event in (zmq.POLLIN, zmq.POLLOUT):
            self.unwatch(socket, event)

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def call(self, action: Callable[[], object]) -> None:
        """Do this in the thread, on its next turn."""
        self._calls.append(action)
        self.wake()

    def stop(self) -> None:
        """One more turn, then the end."""
        self.stopping = True
        self.wake()
        self._thread.join(timeout=STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise WaitTimeout(f"thread {self._thread.name} did not end")
        os.close(self._wake)

    def discard(self) -> None:
        """Instead of `start`: let go of what there is."""
        self.context.destroy(linger=0)
        os.close(self._wake)

    def _act(self, ready: Any, events: int) -> None:
        actions = self._actions[ready]
        if events & (zmq.POLLOUT | zmq.POLLERR) and (action := actions.get(zmq.POLLOUT)) is not None:
            self._attempts.run(action, "send")
        if events & (zmq.POLLIN | zmq.POLLERR) and (action := actions.get(zmq.POLLIN)) is not None:
            self._attempts.run(partial(_until_again, action), "receive")

    def _make_calls(self) -> None:
        while self._calls:
            self._attempts.once(self._calls.popleft(), "call")

    def _run(self) -> None:
        last = False
        try:
            while not last:
                last = self.stopping
                for ready, events in self._poller.poll(0 if last else int(self.turn_s * 1000)):
                    if ready == self._wake:
                        os.eventfd_read(self._wake)
                    elif ready in self._actions:  # not unwatched by what came before it
                        self._act(ready, events)
                self._make_calls()
                self._attempts.run(self._turn)
            self._make_calls()  # which the last turn has asked for
        finally:
            self.context.destroy()


def _key(socket: Pollable) -> Any:
    """As the poller returns it."""
    return socket if isinstance(socket, zmq.Socket) else socket.fileno()


def _until_again(action: Callable[[], None]) -> None:
    try:
        for _ in range(64):
            action()
    except zmq.Again:
        return
