"""A TCP connection whose bytes are encrypted and authenticated (AES-256-GCM), read and written without blocking.

For what must be fast between hosts: any thread sends at once, and the thread that needs a message reads it, so that no
thread is between. Keys are random, for one connection, and come over one that CURVE protects (`data_port.py`). On the
wire each record is its length and its sealed bytes; the nonce is the record's number, so none can be left out, repeated
or put elsewhere.
"""

from __future__ import annotations

import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from membership.base.errors import QueueClosed

Message = tuple[bytes, list[memoryview]]
"""A head, and the buffers that follow it: memory that is the receiver's own."""
KEY_BYTES = 32
RECORD = 1 << 16  # the most bytes that are sealed at once
INLINE = 1 << 13  # buffers that are smaller together are in the record of the head
MOST_BYTES = 1 << 30  # of all buffers of a message
TAG_BYTES = 16
KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
"""Seconds, and attempts: an idle cluster sends nothing here, and firewalls forget what is silent for minutes."""
_LENGTH = struct.Struct("<I")
_FIRST = struct.Struct("<II")  # bytes of the head, number of buffers; their sizes follow
_SIZE_BYTES = 8
_GREETING_BYTES = _LENGTH.size + _FIRST.size + TAG_BYTES  # of an empty message


def new_keys() -> bytes:
    """For one connection: the key of the side that connects, then that of the other one."""
    return secrets.token_bytes(2 * KEY_BYTES)


class SealedSocket:
    """One end. Messages are whole and in order; QueueClosed once the connection has ended."""

    def __init__(self, connection: socket.socket, keys: bytes, *, connects: bool) -> None:
        """Takes over `connection`, which is connected."""
        from cryptography.exceptions import InvalidTag  # only where there are several hosts
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._invalid = InvalidTag
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = connection
        ours, theirs = keys[:KEY_BYTES], keys[KEY_BYTES:]
        self._seal, self._open = (AESGCM(key) for key in ((ours, theirs) if connects else (theirs, ours)))
        self._sending, self._taking = threading.Lock(), threading.Lock()
        self._sealed = self._opened = 0  # records
        self._out = memoryview(bytearray(4 * (_LENGTH.size + RECORD + TAG_BYTES)))
        self._out_end = 0
        self._unsent: deque[memoryview] = deque()
        self._in = memoryview(bytearray(8 * (_LENGTH.size + RECORD + TAG_BYTES)))
        self._in_start = self._in_end = 0
        self._head = b""  # of the message whose buffers are arriving
        self._sizes: list[int] = []
        self._body, self._filled = memoryview(b""), 0
        self._closed = False
        self._ended = ""  # why, if not orderly

    def fileno(self) -> int:
        """-1 once it is closed."""
        return self._socket.fileno()

    def greet(self) -> None:
        """First of all messages, by the side that listens: it is there."""
        self.send(b"")

    def greeted(self) -> bool:
        """Whether the greeting has arrived; reads no more than that."""
        with self._taking:
            self._check_open()
            try:
                got = self._socket.recv_into(self._in[self._in_end : _GREETING_BYTES])
            except BlockingIOError:
                return False
            except OSError as error:
                raise QueueClosed(f"its data connection has ended: {error}") from error
            if not got:
                raise QueueClosed("its data connection has ended before anything passed")
            self._in_end += got
            if self._in_end < _GREETING_BYTES:
                return False
            if list(self._messages()) != [(b"", [])]:
                raise QueueClosed("its data connection began with something else than a greeting")
            return True

    def send(self, head: bytes, buffers: Sequence[memoryview] = ()) -> bool:
        """Whether all was sent; else the rest follows with `flush`, when the socket is writable."""
        with self._sending:
            self._check_open()
            sizes = [each.nbytes for each in buffers]
            first = _FIRST.pack(len(head), len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes) + head
            inline = sum(sizes) <= INLINE
            self._put(b"".join((first, *buffers)) if inline else first)
            for each in () if inline else buffers:
                for at in range(0, each.nbytes, RECORD):
                    self._put(each[at : at + RECORD])
            self._push()
            return not self._unsent

    def flush(self) -> bool:
        """The same for what `send` left."""
        with self._sending:
            self._check_open()
            while self._unsent:
                left = self._write(self._unsent[0])
                if len(left):
                    self._unsent[0] = left
                    return False
                self._unsent.popleft()
            return True

    def take(self) -> list[Message]:
        """What has arrived."""
        found: list[Message] = []
        with self._taking:
            self._check_open()
            while True:
                room = self._in[self._in_end :]
                try:
                    got = self._socket.recv_into(room)
                except BlockingIOError:
                    return found
                except OSError as error:
                    self._ended = f": {error}"  # the socket says so only once
                    got = 0
                if not got:
                    if found:
                        return found  # the end is seen next time
                    raise QueueClosed(f"its data connection has ended{self._ended}")
                self._in_end += got
                found += self._messages()
                if got < len(room):
                    return found

    def close(self) -> None:
        """From any thread, and again."""
        with self._sending, self._taking:
            self._closed = True
            self._socket.close()

    def _check_open(self) -> None:
        if self._closed:
            raise QueueClosed("its data connection is closed")

    # ---- out

    def _put(self, plain: bytes | memoryview) -> None:
        size = len(plain) + TAG_BYTES
        if size > RECORD + TAG_BYTES:
            raise ValueError(f"a head of {len(plain)} bytes")
        end = self._out_end + _LENGTH.size + size
        if end > len(self._out):
            self._push()
            end = _LENGTH.size + size
        _LENGTH.pack_into(self._out, self._out_end, size)
        sealed = self._out[self._out_end + _LENGTH.size : end]
        self._seal.encrypt_into(_nonce(self._sealed), plain, None, sealed)
        self._sealed += 1
        self._out_end = end

    def _push(self) -> None:
        ready, self._out_end = self._out[: self._out_end], 0
        if not self._unsent:
            ready = self._write(ready)
        if len(ready):
            self._unsent.append(memoryview(bytes(ready)))

    def _write(self, data: memoryview) -> memoryview:
        """Returns what could not be written."""
        try:
            return data[self._socket.send(data) :]
        except BlockingIOError:
            return data
        except OSError as error:
            raise QueueClosed(f"its data connection has ended: {error}") from error

    # ---- in

    def _messages(self) -> Iterator[Message]:
        """Those that are whole by now."""
        while (data := self._record()) is not None:
            if self._sizes:
                self._fill(data)
            else:
                self._begin(self._opener(data))
            if not self._sizes or self._filled == len(self._body):
                yield self._whole()
        if self._in_start == self._in_end:
            self._in_start = self._in_end = 0
        elif self._in_start > len(self._in) // 2:
            rest = bytes(self._in[self._in_start : self._in_end])
            self._in[: len(rest)] = rest
            self._in_start, self._in_end = 0, len(rest)

    def _record(self) -> memoryview | None:
        """The next one, sealed, if it has arrived."""
        start = self._in_start + _LENGTH.size
        if start > self._in_end:
            return None
        (size,) = _LENGTH.unpack_from(self._in, self._in_start)
        if not TAG_BYTES <= size <= RECORD + TAG_BYTES:
            raise QueueClosed(f"its data connection has a record of {size} bytes")
        if start + size > self._in_end:
            return None
        self._in_start = start + size
        return self._in[start : start + size]

    def _opener(self, data: memoryview) -> bytes:
        try:
            plain: bytes = self._open.decrypt(_nonce(self._opened), data, None)
        except self._invalid as error:
            raise QueueClosed("its data connection has a record that was not sealed by our peer") from error
        self._opened += 1
        return plain

    def _begin(self, plain: bytes) -> None:
        """The first record of a message."""
        try:
            nhead, count = _FIRST.unpack_from(plain)
            start = _FIRST.size + count * _SIZE_BYTES
            self._sizes = list(struct.unpack_from(f"<{count}Q", plain, _FIRST.size))
        except struct.error as error:
            raise QueueClosed(f"its data connection has a first record of {len(plain)} bytes") from error
        self._head, inline = plain[start : start + nhead], plain[start + nhead :]
        total = sum(self._sizes)
        if total > MOST_BYTES or (inline and len(inline) != total):
            raise QueueClosed(f"its data connection has a message of {total} bytes")
        try:
            self._body = memoryview(bytearray(inline) if inline else np.empty(total, np.uint8).data)
        except MemoryError as error:
            raise QueueClosed(f"there is no memory for a message of {total} bytes") from error
        self._filled = len(inline)

    def _fill(self, data: memoryview) -> None:
        end = self._filled + len(data) - TAG_BYTES
        if end > len(self._body):
            raise QueueClosed("its data connection has a record that fits into no message")
        try:
            self._open.decrypt_into(_nonce(self._opened), data, None, self._body[self._filled : end])
        except self._invalid as error:
            raise QueueClosed("its data connection has a record that was not sealed by our peer") from error
        self._opened += 1
        self._filled = end

    def _whole(self) -> Message:
        buffers, at = [], 0
        for size in self._sizes:
            buffers.append(self._body[at : at + size])
            at += size
        self._sizes = []
        return self._head, buffers


def drain(connections: Mapping[str, SealedSocket], timeout_s: float) -> tuple[set[str], set[str]]:
    """Wait at most that long until all of them have sent all, each as fast as its other side takes it. Which have not,
    and which have ended meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    left, ended = set(connections), set[str]()
    while True:
        poll = select.poll()
        for name in list(left):
            try:
                if connections[name].flush():
                    left.discard(name)
                else:
                    poll.register(connections[name], select.POLLOUT)
            except QueueClosed:
                left.discard(name)
                ended.add(name)
        left_s = deadline - time.monotonic()
        if not left or left_s <= 0:
            return left, ended
        poll.poll(left_s * 1000)


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")
