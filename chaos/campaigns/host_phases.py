"""What a cluster over hosts is put into the middle of while its network fails: a scale-up, a drain, or a recovery.

It begins once the fault was seen to happen, and is taken back after it: each operation must end by itself.
"""

from __future__ import annotations

import threading

from chaos.campaigns.host_bursts import HostPhase
from chaos.faults.signals import kill
from chaos.target.host_cluster import HostCluster
from elastic.cli.client import wait_for
from membership.operations.change import Change, drain, scale, undrain
from membership.store.records import ClusterState, Operation

END_S = 120.0  # for an operation, on a machine that is busy


class PhaseUnderWay:
    """One of them, of a cluster that has `ranks` ranks at rest. `chance` chooses which of them it is about."""

    def __init__(self, cluster: HostCluster, phase: HostPhase, ranks: int, chance: float) -> None:
        self._cluster, self._phase, self._ranks, self._chance = cluster, phase, ranks, chance
        self._operation: Operation | None = None
        self.killed = set[int]()  # incarnations that others must follow

    def begin(self, before: ClusterState) -> None:
        """Ask for it; `before`: the cluster at rest."""
        known = sorted(before.ranks.values(), key=lambda rank: rank.rank)
        chosen = known[int(self._chance * len(known))]
        match self._phase:
            case HostPhase.SCALE_UP:
                self._propose(scale(self._ranks + 1))
            case HostPhase.DRAIN:
                self._propose(drain(chosen.rank))
            case HostPhase.RECOVERY:
                kill(chosen.pid)
                self.killed.add(chosen.incarnation)

    def _propose(self, change: Change) -> None:
        self._operation = self._cluster.client().propose(change, op_id=None, if_epoch=None, timeout_s=END_S)

    def settle(self) -> None:
        """Wait for the operation's end, done or rolled back, and take it back. WaitTimeout: it does not end."""
        if self._operation is None:
            return
        client = self._cluster.client()
        for _ in wait_for(client, self._operation, END_S + 10.0, threading.Event()):
            continue
        for slot in client.status()["drained"]:
            self._cluster.change(undrain(slot), END_S)
        desired = client.state().desired
        if desired is not None and desired.ranks != self._ranks:
            self._cluster.change(scale(self._ranks), END_S)
