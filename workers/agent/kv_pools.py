"""The host's KV pools: the memory of each rank's KV cache, which outlives the rank. Light: no torch.

A pool is a memfd without a size, which the rank gets when it is forked, and fills. The agent has the descriptor: so
what a dead rank had computed can be read by its requests' next homes, until the engine needs it no more. It is given
only once its rank has certainly ended: one that lives might write. A new incarnation has a pool of its own.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable

import msgspec

from membership.base.errors import NoResources
from membership.base.rank_id import ProcessId, RankId
from workers.ipc.handover import Grant, Handover, HandoverRefused, Link, ResourceHandle
from workers.protocol.pool_client import Open


class KvPools:
    """All pools of one host. `close` it: what no rank maps is then free."""

    def __init__(self, ended: Callable[[ProcessId], bool]) -> None:
        """`ended`: whether the process has certainly ended; asked in the listener's thread."""
        self._ended = ended
        self._lock = threading.Lock()
        self._fds: dict[ProcessId, int] = {}
        self._resource = f"kv-pools-{secrets.token_hex(8)}"
        Handover.default().serve(self._resource, self._answer)

    def handle(self) -> bytes:
        """What ranks need to reach it."""
        return msgspec.msgpack.encode(ResourceHandle(Handover.default().address, self._resource))

    @property
    def keys(self) -> frozenset[ProcessId]:
        """Whose pools there are."""
        with self._lock:
            return frozenset(self._fds)

    def make(self, key: ProcessId) -> int:
        """An empty pool for a process that is about to be forked. The descriptor stays ours. NoResources."""
        try:
            made = os.memfd_create("elastic-ep-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise NoResources(f"no KV pool for {key}: {error.strerror}") from error
        self.free(key)
        with self._lock:
            self._fds[key] = made
        return made

    def rename(self, old: ProcessId, new: ProcessId) -> None:
        """A spare has become a rank."""
        with self._lock:
            if old in self._fds:
                self._fds[new] = self._fds.pop(old)

    def free(self, key: ProcessId) -> None:
        """Let go of a pool, if it is there."""
        with self._lock:
            fd = self._fds.pop(key, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Let go of all."""
        Handover.default().withdraw(self._resource)
        for key in self.keys:
            self.free(key)

    def _answer(self, link: Link, request: bytes, fds: list[int]) -> Grant:
        asked = msgspec.msgpack.decode(request, type=Open)
        key = RankId(asked.rank, asked.incarnation)
        if key not in self.keys:
            raise HandoverRefused(f"the pool of {key} is not kept here")
        if not self._ended(key):
            raise HandoverRefused(f"{key} is not known to have ended: it may still write")
        with self._lock:
            if (fd := self._fds.get(key)) is None:
                raise HandoverRefused(f"the pool of {key} is not kept here any more")
            theirs = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        return Grant(fds=[theirs], on_gone=lambda link: os.close(theirs))
