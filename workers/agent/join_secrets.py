"""Which join secrets an agent's host has, and with which of them the ranks listen that it starts now.

Their file is read again each second, and whenever the cluster uses one that the host lacked at the last look.
"""

from __future__ import annotations

from collections.abc import Callable

from membership.base.network import Network
from membership.store.records import ClusterConfig
from workers.queue.network import join_key, join_keys, network_for, refusing_retired

LOOK_EVERY_S = 1.0


class JoinSecrets:
    """`network` is for ranks that are started; `keys` are the public halves of all secrets, for the agent's record."""

    def __init__(self, network: Network | None, clock: Callable[[], float]) -> None:
        self.network, self.keys = network, join_keys(network)
        self._clock, self._look_at = clock, 0.0

    @property
    def key(self) -> str:
        """Of the secret with which a rank listens that is started now."""
        return join_key(self.network)

    @property
    def retired(self) -> frozenset[str]:
        """Of the secrets with which no engine may listen any more."""
        return self.network.retired if self.network is not None else frozenset()

    def look(self, config: ClusterConfig | None) -> bool:
        """Look again; whether ranks listen with another secret from now on. If the host lacks it, they do not."""
        other = config is not None and config.join_key != self.key
        if self.network is None or config is None:
            return False
        self.network = refusing_retired(config, self.network)
        if not (other or self._clock() >= self._look_at):
            return False
        self._look_at = self._clock() + LOOK_EVERY_S
        self.keys = join_keys(self.network)
        if not other or config.join_key not in self.keys:
            return False
        self.network = network_for(config, self.network)
        return True
