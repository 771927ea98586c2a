"""The host's weight store: what its ranks have loaded, in sealed anonymous memory that outlives them. Light: no torch.

It lives in the process that starts the ranks (the agent, through its executor) and is reached like every other page:
over the handover, by descriptor. It reads no checkpoint itself: the first rank that needs something loads and deposits
it, all later ones map it. An entry is one memfd, sealed before the store takes it: from then on not even its maker can
change it. The store holds the descriptor, so an entry outlives its maker, and is in memory once however many ranks map
it. `workers/model/shared_weights.py` is the ranks' side.
"""

from __future__ import annotations

import fcntl
import os
import resource
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog

from workers.ipc.handover import Grant, Handover, HandoverRefused, Link, ResourceHandle
from workers.protocol.bandwidth import Bucket
from workers.protocol.weight_client import BATCH, SEALS, Book, Checked, Deposit, Find, Held, WeightRequest

log = structlog.get_logger(__name__)

OnEvent = Callable[..., object]
"""Called as (kind, **fields), in the store's listener thread."""


class WeightStore:
    """The store of one host. `close` it: what no rank maps is then free."""

    def __init__(
        self, on_event: OnEvent | None = None, bytes_per_s: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_event = on_event
        self._bucket, self._clock = Bucket(bytes_per_s) if bytes_per_s else None, clock
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Held, int]] = {}  # with the descriptor
        self._reported = -1
        self._resource = f"weights-{secrets.token_hex(8)}"
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one descriptor per expert of a whole model
        Handover.default().serve(self._resource, self._answer)

    def handle(self) -> bytes:
        """What ranks need to reach it."""
        return msgspec.msgpack.encode(ResourceHandle(Handover.default().address, self._resource))

    @property
    def nbytes(self) -> int:
        """Memory held, counted once."""
        with self._lock:
            return sum(held.size for held, _ in self._held.values())

    @property
    def keys(self) -> frozenset[str]:
        """All entries."""
        with self._lock:
            return frozenset(self._held)

    def close(self) -> None:
        """Stop answering and let go of everything; ranks keep what they map."""
        Handover.default().withdraw(self._resource)
        self.clear()

    def clear(self) -> None:
        """Let go of everything: it was of a model that the cluster does not serve."""
        with self._lock:
            fds = [fd for _, fd in self._held.values()]
            self._held.clear()
        for fd in fds:
            os.close(fd)
        self._report()

    def _answer(self, link: Link, request: bytes, fds: list[int]) -> Grant:
        asked = msgspec.msgpack.decode(request, type=WeightRequest)
        if isinstance(asked, Find):
            return self._grant(asked.keys)
        if isinstance(asked, Deposit):
            self._take(asked, fds)
            return self._grant([asked.key])
        if isinstance(asked, Book):
            with self._lock:
                wait_s = self._bucket.book(asked.nbytes, self._clock()) if self._bucket is not None else 0.0
            return Grant(msgspec.msgpack.encode(wait_s))
        self._note(asked)
        return Grant()

    def _grant(self, keys: Sequence[str]) -> Grant:
        with self._lock:
            found = [self._held[key] for key in keys[:BATCH] if key in self._held]
        return Grant(msgspec.msgpack.encode([held for held, _ in found]), [fd for _, fd in found])

    def _take(self, asked: Deposit, fds: list[int]) -> None:
        if len(fds) != 1 or fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise HandoverRefused(f"deposit of {asked.key}: not one sealed piece of memory")
        with self._lock:
            if asked.key not in self._held:
                size = os.fstat(fds[0]).st_size
                held = Held(asked.key, size, asked.checksum, verified=False)
                self._held[asked.key] = held, fcntl.fcntl(fds[0], fcntl.F_DUPFD_CLOEXEC, 0)

    def _note(self, asked: Checked) -> None:
        dropped = []
        with self._lock:
            for key, checksum in asked.right:
                held, fd = self._held.get(key, (None, -1))
                if held is not None and held.checksum == checksum:
                    self._held[key] = msgspec.structs.replace(held, verified=True), fd
            for key, checksum in asked.wrong:
                held, fd = self._held.get(key, (None, -1))
                if held is not None and held.checksum == checksum:
                    del self._held[key]
                    os.close(fd)
                    dropped.append(key)
        for key in dropped:
            log.error("weights_dropped", key=key, reason="checksum")
            self._emit("weights_dropped", key=key, reason="checksum")
        self._report()

    def _report(self) -> None:
        nbytes = self.nbytes
        if nbytes != self._reported:
            self._reported = nbytes
            self._emit("weights_held", entries=len(self.keys), bytes=nbytes)

    def _emit(self, kind: str, **fields: Any) -> None:
        if self._on_event is not None:
            self._on_event(kind, **fields)
