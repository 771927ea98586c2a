"""What an agent waits for before it begins: the end of an earlier agent of its node."""

from __future__ import annotations

import threading

from membership.base.errors import Fenced, WaitTimeout
from membership.base.timing import TAKEOVER_S
from membership.store.mirror import Mirror
from membership.store.records import ClusterState


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
