"""The host's weight store: what its ranks have loaded, in sealed anonymous memory that outlives them. Light: no torch.

It lives in the process that starts the ranks (the agent, through its executor) and is reached like every other page:
over the handover, by descriptor. It reads no checkpoint itself: the ranks divide the reading. Each claims what is there
neither yet nor claimed, reads and deposits it, and maps what others have deposited. A claim ends with its session: a
rank that dies leaves its part to the others. A shard of several entries is one memfd, sealed before the store takes it:
from then on not even its maker can change it. The store holds the descriptor, so a shard outlives its maker, and is in
memory once however many ranks map it. `workers/model/shared_weights.py` is the ranks' side. It knows which other hosts
have a store, for ranks that lack the files, and is what this host's `BulkServer` sends of (`peer_hosts.py`).
"""

from __future__ import annotations

import fcntl
import os
import resource
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import msgspec
import structlog

from membership.base.errors import QueueError
from workers.ipc.handover import Grant, Handover, HandoverRefused, Link, ResourceHandle
from workers.protocol.bandwidth import Bucket
from workers.protocol.weight_client import (
    BATCH,
    SEALS,
    Answer,
    Book,
    Checked,
    Claim,
    Deposit,
    Find,
    Held,
    Join,
    Takes,
    Wanted,
    WeightRequest,
    Wrong,
)
from workers.protocol.weight_peers import Elsewhere, Peer, Place, on_any_host

log = structlog.get_logger(__name__)

OnEvent = Callable[..., object]
"""Called as (kind, **fields), in the store's listener thread."""


@dataclass
class _Shard:
    """One sealed memfd, and what is in it."""

    number: int
    fd: int
    size: int
    checksum: int
    keys: frozenset[str]
    verified: bool = False


class WeightStore:
    """The store of one host. `close` it: what no rank maps is then free."""

    def __init__(
        self, on_event: OnEvent | None = None, bytes_per_s: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_event = on_event
        self._bucket, self._clock = Bucket(bytes_per_s) if bytes_per_s else None, clock
        self._lock = threading.Lock()
        self._shards: dict[int, _Shard] = {}
        self._of: dict[str, _Shard] = {}  # the shard that has the entry
        self._sessions: dict[int, Link] = {}
        self._claims: dict[str, int] = {}  # entry that is being read -> the session that reads it
        self._named: dict[str, _Shard] = {}  # the same as `_of`, by what other hosts call the entry
        self._taking: dict[int, list[str]] = {}  # session -> nodes from which it takes entries
        self._peers: tuple[Peer, ...] = ()
        self._digest: Callable[[str], bytes] = lambda name: b""
        self._numbers = count(1)
        self._reported = -1
        self._resource = f"weights-{secrets.token_hex(8)}"
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one descriptor per shard of a whole model
        Handover.default().serve(self._resource, self._answer)

    def handle(self) -> bytes:
        """What ranks need to reach it."""
        return msgspec.msgpack.encode(ResourceHandle(Handover.default().address, self._resource))

    @property
    def nbytes(self) -> int:
        """Memory held, counted once."""
        with self._lock:
            return sum(shard.size for shard in self._shards.values())

    @property
    def keys(self) -> frozenset[str]:
        """All entries."""
        with self._lock:
            return frozenset(self._of)

    def close(self) -> None:
        """Stop answering and let go of everything; ranks keep what they map."""
        Handover.default().withdraw(self._resource)
        self.clear()

    def clear(self) -> None:
        """Let go of everything: it was of a model that the cluster does not serve."""
        with self._lock:
            shards = list(self._shards.values())
            self._shards.clear()
            self._of.clear()
            self._named.clear()
        for shard in shards:
            os.close(shard.fd)
        self._report()

    # --- other hosts: from any thread

    def know(self, peers: tuple[Peer, ...], digest: Callable[[str], bytes]) -> None:
        """These hosts may have what ranks lack; `digest` says what an entry is by content, as far as that is known."""
        with self._lock:
            self._peers, self._digest = peers, digest

    @property
    def taking_from(self) -> tuple[str, ...]:
        """Nodes from which ranks of this host take weights now."""
        return tuple(sorted({node for nodes in list(self._taking.values()) for node in nodes}))

    def held(self, names: Sequence[str]) -> list[Place]:
        """Where entries are, by what all hosts call them."""
        with self._lock:
            found = [(name, self._named[name]) for name in names[:BATCH] if name in self._named]
        return [Place(name, shard.number, shard.size, shard.checksum) for name, shard in found]

    def read(self, shard: int, offset: int, nbytes: int) -> bytes:
        """A range of a shard. QueueError: there is none."""
        with self._lock:  # so that nothing closes the descriptor
            found = self._shards.get(shard)
            size = os.fstat(found.fd).st_size if found is not None else 0
            if found is None or not 0 <= offset <= offset + nbytes <= size:
                raise QueueError(f"no shard {shard} with {nbytes} bytes at {offset}")
            return os.pread(found.fd, nbytes, offset)

    def book(self, nbytes: int) -> float:
        """Announce that so much is read of the checkpoint, or sent to another host; how many seconds to wait first."""
        with self._lock:
            return self._bucket.book(nbytes, self._clock()) if self._bucket is not None else 0.0

    # --- the listener thread

    def _answer(self, link: Link, request: bytes, fds: list[int]) -> Grant:
        asked = msgspec.msgpack.decode(request, type=WeightRequest)
        if isinstance(asked, Find):
            return self._grant(asked.keys)
        if isinstance(asked, Claim):
            return self._claim(asked)
        if isinstance(asked, Join):
            return self._join(link)
        if isinstance(asked, Deposit):
            self._take(asked, fds)
            return self._grant(asked.keys)
        if isinstance(asked, Book):
            return Grant(msgspec.msgpack.encode(self.book(asked.nbytes)))
        if isinstance(asked, Wanted):
            with self._lock:
                peers, digest = self._peers, self._digest
            digests = [digest(name) for name in asked.names[:BATCH]]
            return Grant(msgspec.msgpack.encode(Elsewhere(list(peers), digests)))
        if isinstance(asked, Takes):
            self._takes(asked)
            return Grant()
        if isinstance(asked, Wrong):
            log.error("weights_peer_left_out", peer=asked.node, key=asked.name, reason=asked.reason)
            self._emit("weights_peer_left_out", peer=asked.node, key=asked.name, reason=asked.reason)
            return Grant()
        self._note(asked)
        return Grant()

    def _grant(self, keys: Sequence[str], yours: Sequence[str] = ()) -> Grant:
        with self._lock:
            found: dict[int, list[str]] = {}
            for key in keys[:BATCH]:
                if key in self._of:
                    found.setdefault(self._of[key].number, []).append(key)
            shards = [self._shards[number] for number in found]
            held = [Held(s.number, found[s.number], s.size, s.checksum, s.verified) for s in shards]
        return Grant(msgspec.msgpack.encode(Answer(held, list(yours))), [s.fd for s in shards])

    def _join(self, link: Link) -> Grant:
        session = next(self._numbers)
        self._sessions[session] = link
        still_reads = lambda link, data, fds: self._notify(session)  # noqa: E731
        encoded = msgspec.msgpack.encode(session)
        return Grant(encoded, on_message=still_reads, on_gone=lambda link: self._left(session))

    def _left(self, session: int) -> None:
        self._sessions.pop(session, None)
        self._taking.pop(session, None)
        for key in [key for key, claimant in self._claims.items() if claimant == session]:
            del self._claims[key]
        self._notify(session)

    def _takes(self, asked: Takes) -> None:
        before = self.taking_from
        if asked.session in self._sessions:
            self._taking[asked.session] = asked.nodes
        if self.taking_from != before:
            self._emit("weights_from_peers", peers=list(self.taking_from))

    def _notify(self, session: int) -> None:
        """All other sessions: one of them may wait for this one."""
        for other, link in self._sessions.items():
            if other != session:
                with suppress(QueueError):  # it is gone, or has enough to read
                    link.send(b".")

    def _claim(self, asked: Claim) -> Grant:
        """The listener thread answers one request after the other: no two sessions get the same."""
        keys = asked.keys[:BATCH]
        yours = [key for key in keys if key not in self._of and self._claims.get(key, asked.session) == asked.session]
        if asked.session in self._sessions:
            self._claims |= dict.fromkeys(yours, asked.session)
        return self._grant(keys, yours)

    def _take(self, asked: Deposit, fds: list[int]) -> None:
        if len(fds) != 1 or fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise HandoverRefused(f"deposit of {asked.keys[0]}: not one sealed piece of memory")
        with self._lock:
            new = frozenset(key for key in asked.keys if key not in self._of)
            if new:
                fd, size = fcntl.fcntl(fds[0], fcntl.F_DUPFD_CLOEXEC, 0), os.fstat(fds[0]).st_size
                shard = _Shard(next(self._numbers), fd, size, asked.checksum, new)
                self._shards[shard.number] = shard
                self._of |= dict.fromkeys(new, shard)
                self._named |= dict.fromkeys(map(on_any_host, new), shard)
        for key in asked.keys:
            self._claims.pop(key, None)
        self._notify(0)

    def _note(self, asked: Checked) -> None:
        dropped: list[_Shard] = []
        with self._lock:
            for number, checksum in asked.right:
                if number in self._shards and self._shards[number].checksum == checksum:
                    self._shards[number].verified = True
            for number, checksum in asked.wrong:
                if number in self._shards and self._shards[number].checksum == checksum:
                    dropped.append(self._shards.pop(number))
            for shard in dropped:
                self._of = {key: of for key, of in self._of.items() if of is not shard}
                self._named = {name: of for name, of in self._named.items() if of is not shard}
                os.close(shard.fd)
        for shard in dropped:
            for key in sorted(shard.keys):
                log.error("weights_dropped", key=key, reason="checksum")
                self._emit("weights_dropped", key=key, reason="checksum")
        self._report()

    def _report(self) -> None:
        nbytes = self.nbytes
        if nbytes != self._reported:
            self._reported = nbytes
            self._emit("weights_held", entries=len(self.keys), bytes=nbytes, shards=len(self._shards))

    def _emit(self, kind: str, **fields: Any) -> None:
        if self._on_event is not None:
            self._on_event(kind, **fields)
