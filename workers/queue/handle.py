"""How to join a queue, as plain data for records in the store, and the two messages of joining."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from membership.base.errors import QueueError
from membership.base.network import ANY_PORT, Ports


class Handle(msgspec.Struct, frozen=True, array_like=True):
    """Names a queue and how to reach its writer. Never taken from clients."""

    queue: str  # unique: the name and a random part
    codec: str
    host: str  # which host and network namespace the writer is in
    address: str  # of the writer's handover, for readers there
    remote: str = ""  # ZeroMQ endpoint, for readers elsewhere
    remote_key: bytes = b""  # CURVE public key of that endpoint

    def encode(self) -> bytes:
        """As bytes for a record."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Handle:
        """From a record; QueueError if it is not a handle."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise QueueError(f"not a queue handle: {error}") from error


class CurveKeys(msgspec.Struct, frozen=True):
    """A key pair in ZeroMQ's printable form (Z85); `curve.new_keys` makes one."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"CurveKeys(public={self.public!r})"  # the secret goes into no log


class Remote(msgspec.Struct, frozen=True):
    """How a writer serves readers on other hosts."""

    host: str  # what is bound, and what readers connect to
    keys: CurveKeys
    allowed: frozenset[bytes]  # public keys of the readers that may join
    ports: Ports = ANY_PORT


class Join(msgspec.Struct, frozen=True, array_like=True):
    """A reader asks in. Its id is unique: a restarted process must bring another (say, with its incarnation)."""

    reader_id: str
    codec: str


class Joined(msgspec.Struct, frozen=True, array_like=True):
    """It is in: messages from position `start` on are for it."""

    slot: int
    start: int
    ring_bytes: int
    arena_bytes: int


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """Of a data connection (`data_port.py`): where to connect, once, what to show there, and its keys."""

    address: str
    token: bytes
    keys: bytes

    def __repr__(self) -> str:
        return f"Offer({self.address!r})"  # the keys go into no log


def this_host() -> str:
    """Same value in two processes that are on one host and in one network namespace: they meet over Unix sockets."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
