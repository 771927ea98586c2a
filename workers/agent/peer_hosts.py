"""This host among those that have weights: it sends what it holds, and its store knows who has what its ranks lack.

It listens with the cluster's join secret; when another one is taken up it listens anew, and what was under way is asked
again (`workers/model/peer_weights.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from membership.base.attempts import is_shortage
from membership.base.errors import ConfigError, QueueError
from membership.base.network import Network
from membership.store.records import ClusterConfig, ClusterState
from workers.agent.weight_store import WeightStore
from workers.protocol.weight_peers import Place, digest_of, peers_of
from workers.queue.network import Purpose, listening_keys, remote_of

if TYPE_CHECKING:
    from workers.bulk.server import BulkServer


LISTEN_AGAIN_S = 5.0  # after no port was free, or the machine lacked something
log = structlog.get_logger(__name__)


class HostSource:
    """What this host sends: its weight store, and the small files that the cluster's config names."""

    def __init__(self, store: WeightStore, config: ClusterConfig) -> None:
        self._store, self._root, self._names = store, Path(config.model), frozenset(dict(config.files))

    def held(self, names: Sequence[str]) -> list[Place]:
        """Where these entries are."""
        return self._store.held(names)

    def read(self, shard: int, offset: int, nbytes: int) -> bytes:
        """A range of a shard."""
        return self._store.read(shard, offset, nbytes)

    def book(self, nbytes: int) -> float:
        """How long to wait before so much is sent."""
        return self._store.book(nbytes)

    def file(self, name: str) -> bytes:
        """One of the small files, as it is now: who asked knows its digest."""
        if name not in self._names:
            raise QueueError(f"{name} is no small file of the checkpoint")
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise QueueError(f"{name}: {error.strerror}") from error


class PeerHosts:
    """Owns this host's `BulkServer`. All calls come from one thread."""

    def __init__(
        self, config: ClusterConfig, node: str, store: WeightStore, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._node, self._store, self._source = node, store, HostSource(store, config)
        self._server: BulkServer | None = None
        self._clock, self._again_at = clock, 0.0

    def meet(self, state: ClusterState, network: Network) -> dict[str, str]:
        """Note who is there; where this host listens and with which public key, as its agent's record has it."""
        self._store.know(peers_of(state, self._node), partial(digest_of, served=state.checkpoint))
        key = listening_keys(network, Purpose.WEIGHTS).public.decode("ascii")
        if (self._server is None or self._server.key != key) and self._clock() >= self._again_at:
            self._listen(network)
        if self._server is None:
            return {"weights_at": "", "weights_key": ""}
        return {"weights_at": self._server.endpoint, "weights_key": self._server.key}

    def _listen(self, network: Network) -> None:
        """Anew, if need be. Ranks that serve do not depend on it: without a free port it is tried again later."""
        from workers.bulk.server import BulkServer  # with ZeroMQ: only where there are several hosts

        try:
            newer = BulkServer(remote_of(network, Purpose.WEIGHTS), self._source)
        except Exception as error:
            self._again_at = self._clock() + LISTEN_AGAIN_S
            if not isinstance(error, ConfigError | QueueError) and not is_shortage(error):
                raise
            log.warning("weights_not_sent", error=str(error), hint=getattr(error, "hint", ""))
            return
        older, self._server = self._server, newer
        if older is not None:
            older.close()

    def close(self) -> None:
        """Send no more."""
        if self._server is not None:
            self._server.close()
            self._server = None
