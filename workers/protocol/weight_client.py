"""A rank's way to its host's weight store: the questions, the answers, and the client. Light: no torch.

The store is `workers/agent/weight_store.py`; what ranks do with its entries is `workers/model/shared_weights.py`.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence

import msgspec

from membership.base.errors import ConfigError, QueueError
from workers.ipc.handover import JOIN_TIMEOUT_S, MAX_FDS, Handover, Link, ResourceHandle

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
BATCH = MAX_FDS  # keys per question


class Find(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: which of these do you hold? At most BATCH."""

    keys: list[str]


class Deposit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: keep this; its memfd came along. The answer is what the store holds: the first deposit wins."""

    key: str
    checksum: int


class Checked(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: what came of comparing checksums, as (key, checksum); the end of one load."""

    right: list[tuple[str, int]]
    wrong: list[tuple[str, int]]


class Held(msgspec.Struct, frozen=True, array_like=True):
    """Store to rank: one entry; its memfd came along, in the order of the keys. `verified`: a rank has checked it."""

    key: str
    size: int
    checksum: int
    verified: bool


class Book(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: I am about to read `nbytes` of the checkpoint. The answer is how many seconds to wait."""

    nbytes: int


WeightRequest = Find | Deposit | Checked | Book


class WeightClient:
    """A rank's way to its host's store. Every call is one short question; the caller closes the descriptors it gets."""

    def __init__(self, handle: bytes, timeout_s: float = JOIN_TIMEOUT_S) -> None:
        try:
            self._where = msgspec.msgpack.decode(handle, type=ResourceHandle)
        except msgspec.MsgspecError as error:
            raise ConfigError("this is not the handle of a weight store") from error
        self._timeout_s = timeout_s

    def find(self, keys: Sequence[str]) -> dict[str, tuple[Held, int]]:
        """What the store holds of `keys` (at most BATCH), with a descriptor each."""
        return self._ask(Find(list(keys)))

    def deposit(self, key: str, checksum: int, fd: int) -> tuple[Held, int]:
        """Hand over a sealed memfd; what the store holds now under that key: this, or what came first."""
        found = self._ask(Deposit(key, checksum), [fd])
        if key not in found:
            raise QueueError(f"the weight store dropped {key} while it was deposited")
        return found[key]

    def book(self, nbytes: int) -> float:
        """Announce a read of `nbytes` of the checkpoint; how many seconds to wait first."""
        link = self._connect(Book(nbytes))
        try:
            return msgspec.msgpack.decode(link.reply, type=float)
        finally:
            link.close()

    def checked(self, right: list[tuple[str, int]], wrong: list[tuple[str, int]]) -> None:
        """Say what came of comparing checksums."""
        for start in range(0, max(len(right), len(wrong), 1), 100):
            self._ask(Checked(right[start : start + 100], wrong[start : start + 100]))

    def _ask(self, request: WeightRequest, fds: Sequence[int] = ()) -> dict[str, tuple[Held, int]]:
        link = self._connect(request, fds)
        try:
            held = msgspec.msgpack.decode(link.reply, type=list[Held]) if link.reply else []
            got, link.reply_fds = link.reply_fds, []
            return {entry.key: (entry, fd) for entry, fd in zip(held, got, strict=True)}
        finally:
            link.close()

    def _connect(self, request: WeightRequest, fds: Sequence[int] = ()) -> Link:
        return Handover.default().connect(
            self._where.address, self._where.resource, msgspec.msgpack.encode(request), fds, timeout_s=self._timeout_s
        )
