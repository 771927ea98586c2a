"""A rank's way to its host's weight store: the questions, the answers, and the client. Light: no torch.

The store is `workers/agent/weight_store.py`; what ranks do with its entries is `workers/model/shared_weights.py`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence

import msgspec

from membership.base.errors import ConfigError, QueueError
from workers.ipc.handover import JOIN_TIMEOUT_S, MAX_FDS, Handover, Link, OnMessage, ResourceHandle
from workers.protocol.weight_peers import Elsewhere

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
BATCH = MAX_FDS  # keys per question


class Find(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: which of these do you hold? At most BATCH."""

    keys: list[str]


class Claim(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: as Find, but what is not held or read yet is now this session's to read
    and deposit. At most BATCH."""

    session: int
    keys: list[str]


class Join(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: a session of claims, which end with the link. The answer is its number.

    The store sends a byte on it whenever another session has deposited, ended or said that it still reads.
    """


class Deposit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: keep this shard, which has these entries; its memfd came along. Of an entry, the first deposit
    wins: the answer is what the store holds of the keys.
    """

    keys: list[str]
    checksum: int


class Checked(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: what came of comparing checksums, as (shard, checksum); the end of one load."""

    right: list[tuple[int, int]]
    wrong: list[tuple[int, int]]


class Held(msgspec.Struct, frozen=True, array_like=True):
    """Store to rank: one shard, with those of its entries that were asked for; its memfd came along, in this order.
    `verified`: a rank has compared its checksum.
    """

    shard: int
    keys: list[str]
    size: int
    checksum: int
    verified: bool


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """Store to rank: what it holds, and what is now this session's to read."""

    held: list[Held]
    yours: list[str] = []


class Book(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: I am about to read `nbytes` of the checkpoint. The answer is how many seconds to wait."""

    nbytes: int


class Wanted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: I have no files of these entries (at most BATCH). Which hosts may have them?"""

    names: list[str]


class Takes(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: this session takes entries from these nodes, until its end."""

    session: int
    nodes: list[str]


class Wrong(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Rank to store: this node could not give what it is said to have."""

    node: str
    name: str
    reason: str


WeightRequest = Find | Claim | Join | Deposit | Checked | Book | Wanted | Takes | Wrong
Shards = list[tuple[Held, int]]
"""With a descriptor each, which the caller closes."""


class WeightClient:
    """A rank's way to its host's store. Every call is one short question; the caller closes the descriptors it gets."""

    def __init__(self, handle: bytes, timeout_s: float = JOIN_TIMEOUT_S) -> None:
        try:
            self._where = msgspec.msgpack.decode(handle, type=ResourceHandle)
        except msgspec.MsgspecError as error:
            raise ConfigError("this is not the handle of a weight store") from error
        self._timeout_s = timeout_s

    def find(self, keys: Sequence[str]) -> Shards:
        """What the store holds of `keys` (at most BATCH)."""
        return self._ask(Find(list(keys)))[0]

    def claim(self, session: int, keys: Sequence[str]) -> tuple[Shards, list[str]]:
        """What the store holds of `keys` (at most BATCH), and which of the others this session must read."""
        return self._ask(Claim(session, list(keys)))

    def join(self, on_news: Callable[[], None]) -> tuple[Link, int]:
        """A session, which ends when the link is closed; `on_news` is called in another thread."""
        link = self._connect(Join(), on_message=lambda link, data, fds: on_news())
        return link, msgspec.msgpack.decode(link.reply, type=int)

    def deposit(self, keys: Sequence[str], checksum: int, fd: int) -> Shards:
        """Hand over a sealed memfd; what the store holds now of its keys: this, or what came first."""
        found, _ = self._ask(Deposit(list(keys), checksum), [fd])
        if {key for held, _ in found for key in held.keys} != set(keys):
            for _, theirs in found:
                os.close(theirs)
            raise QueueError(f"the weight store dropped {keys[0]} while it was deposited")
        return found

    def book(self, nbytes: int) -> float:
        """Announce a read of `nbytes` of the checkpoint; how many seconds to wait first."""
        link = self._connect(Book(nbytes))
        try:
            return msgspec.msgpack.decode(link.reply, type=float)
        finally:
            link.close()

    def wanted(self, names: Sequence[str]) -> Elsewhere:
        """Which hosts may have these entries, and what they are by content."""
        link = self._connect(Wanted(list(names)))
        try:
            return msgspec.msgpack.decode(link.reply, type=Elsewhere)
        finally:
            link.close()

    def takes(self, session: int, nodes: Sequence[str]) -> None:
        """Say from whom entries come now."""
        self._connect(Takes(session, list(nodes))).close()

    def wrong(self, node: str, name: str, reason: str) -> None:
        """Say which node could not give an entry."""
        self._connect(Wrong(node, name, reason)).close()

    def checked(self, right: list[tuple[int, int]], wrong: list[tuple[int, int]]) -> None:
        """Say what came of comparing checksums."""
        for start in range(0, max(len(right), len(wrong), 1), 100):
            self._ask(Checked(right[start : start + 100], wrong[start : start + 100]))

    def _ask(self, request: WeightRequest, fds: Sequence[int] = ()) -> tuple[Shards, list[str]]:
        link = self._connect(request, fds)
        try:
            answer = msgspec.msgpack.decode(link.reply, type=Answer) if link.reply else Answer([])
            got, link.reply_fds = link.reply_fds, []
            return list(zip(answer.held, got, strict=True)), answer.yours
        finally:
            link.close()

    def _connect(self, request: WeightRequest, fds: Sequence[int] = (), on_message: OnMessage | None = None) -> Link:
        return Handover.default().connect(
            self._where.address, self._where.resource, msgspec.msgpack.encode(request), fds,
            timeout_s=self._timeout_s, on_message=on_message,
        )  # fmt: skip
