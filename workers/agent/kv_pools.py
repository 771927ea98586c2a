"""The host's KV pools: the memory of each rank's KV cache, which outlives the rank. Light: no torch.

A pool is a memfd without a size, which the rank gets when it is forked, and fills; a rank on a GPU gives us memory
there in its place. The agent has the descriptor: so what a dead rank had computed can be read by its requests' next
homes, until the engine needs it no more. It is given only once its rank has certainly ended: one that lives might
write. What a dead rank's kernels still write on a GPU are cells of tokens that were not confirmed, and are not read.
A new incarnation has a pool of its own.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Sequence

import msgspec

from membership.base.errors import NoResources
from membership.base.rank_id import NO_SLOT, ProcessId, RankId, SpareId
from workers.ipc.handover import Grant, Handover, HandoverRefused, Link, ResourceHandle
from workers.protocol.pool_client import Given, LeftPool, Open


class KvPools:
    """All pools of one host. `close` it: what no rank maps is then free."""

    def __init__(self, ended: Callable[[ProcessId], bool]) -> None:
        """`ended`: whether the process has certainly ended; asked in the listener's thread."""
        self._ended = ended
        self._lock = threading.Lock()
        self._pools: dict[ProcessId, LeftPool] = {}
        self._resource = f"kv-pools-{secrets.token_hex(8)}"
        Handover.default().serve(self._resource, self._answer)

    def handle(self) -> bytes:
        """What ranks need to reach it."""
        return msgspec.msgpack.encode(ResourceHandle(Handover.default().address, self._resource))

    @property
    def keys(self) -> frozenset[ProcessId]:
        """Whose pools there are."""
        with self._lock:
            return frozenset(self._pools)

    def make(self, key: ProcessId) -> int:
        """An empty pool for a process that is about to be forked. The descriptor stays ours. NoResources."""
        try:
            made = os.memfd_create("elastic-ep-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise NoResources(f"no KV pool for {key}: {error.strerror}") from error
        self.free(key)
        with self._lock:
            self._pools[key] = LeftPool(made, 0)
        return made

    def rename(self, old: ProcessId, new: ProcessId) -> None:
        """A spare has become a rank."""
        with self._lock:
            if old in self._pools:
                self._pools[new] = self._pools.pop(old)

    def free(self, key: ProcessId) -> None:
        """Let go of a pool, if it is there."""
        with self._lock:
            pool = self._pools.pop(key, None)
        if pool is not None:
            os.close(pool.fd)

    def close(self) -> None:
        """Let go of all."""
        Handover.default().withdraw(self._resource)
        for key in self.keys:
            self.free(key)

    def _answer(self, link: Link, request: bytes, fds: list[int]) -> Grant:
        asked = msgspec.msgpack.decode(request, type=Open)
        key = SpareId(asked.incarnation) if asked.rank == NO_SLOT else RankId(asked.rank, asked.incarnation)
        if key not in self.keys:
            raise HandoverRefused(f"the pool of {key} is not kept here")
        if fds:
            return self._keep(key, asked, fds)
        if not self._ended(key):
            raise HandoverRefused(f"{key} is not known to have ended: it may still write")
        with self._lock:
            if (pool := self._pools.get(key)) is None:
                raise HandoverRefused(f"the pool of {key} is not kept here any more")
            # A GPU's descriptor cannot be opened anew: then it is another file.
            theirs = os.dup(pool.fd) if pool.nbytes else os.open(f"/proc/self/fd/{pool.fd}", os.O_RDONLY | os.O_CLOEXEC)
        return Grant(msgspec.msgpack.encode(Given(pool.nbytes)), [theirs], on_gone=lambda link: os.close(theirs))

    def _keep(self, key: ProcessId, asked: Open, fds: Sequence[int]) -> Grant:
        """Memory on a GPU in the place of the memfd, which that rank leaves empty."""
        with self._lock:
            old = self._pools.get(key)
            if old is None or asked.nbytes <= 0:
                raise HandoverRefused(f"the pool of {key} cannot be kept: {asked.nbytes} bytes")
            self._pools[key] = LeftPool(os.dup(fds[0]), asked.nbytes)
        os.close(old.fd)
        return Grant(msgspec.msgpack.encode(Given(asked.nbytes)))
