"""What an agent needs before it begins: its name, the join secret, config and tokenizer."""

from __future__ import annotations

import threading
from pathlib import Path

from membership.base.errors import Fenced, WaitTimeout
from membership.base.network import Network
from membership.base.timing import TAKEOVER_S
from membership.store.mirror import Mirror
from membership.store.records import ClusterConfig, ClusterState
from workers.queue.network import require_joined, require_reachable


def admitted(
    mirror: Mirror, config: ClusterConfig, node: str, network: Network | None, stop: threading.Event
) -> Network | None:
    """What the agent listens with, once no other has its name. ConfigError: it does not fit the cluster."""
    ours = require_joined(config, network)
    wait_for_name(mirror, node, stop)
    require_reachable(mirror.state(), node, ours)
    return ours


def model_of(
    mirror: Mirror, model: str, node: str, keep: Path | None, network: Network | None, stop: threading.Event
) -> str:
    """Where its checkpoint's config is: `model`, unless it is not there and other hosts have sent it into `keep`."""
    if keep is None or network is None:
        return model
    from workers.bulk.model_files import model_directory  # with ZeroMQ: only where there are several hosts

    return model_directory(mirror, model, node, keep, network, stop)


def wait_for_name(mirror: Mirror, node: str, stop: threading.Event) -> None:
    """Wait until an earlier agent's record is gone: two agents of one node would undo each other's work."""

    def free(state: ClusterState) -> bool:
        return node not in state.agents or stop.is_set()

    try:
        mirror.wait(free, TAKEOVER_S, f"the earlier agent of node {node} to be gone")
    except WaitTimeout as error:
        other = mirror.state().agents.get(node)
        pid = other.pid if other else 0
        raise Fenced(
            f"another agent (pid {pid}) runs as node {node}", hint="give each host its own --node name"
        ) from error
