"""A cluster on this machine as injectors see it: which process has which role."""

from __future__ import annotations

from pathlib import Path

import psutil

from chaos.faults.base import NotInjected
from chaos.target.cluster import Cluster
from membership.base.events import Event
from membership.base.failpoints import write
from membership.base.process_stats import command_words

FORKSERVER = "elastic-ep::forkserver"  # its process title
ROLES = ("gateway", "engine", "engine-standby", "controller", "agent", "etcd", "supervisor", "forkserver")


class ServedSite:
    """The site of a cluster that is served from this machine."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def pid(self, victim: str) -> int:
        """Process id of a rank ("rank 2") or a role; NotInjected if there is none now."""
        found = self._rank(int(victim.split()[1])) if victim.startswith("rank ") else self._role(victim)
        if not found or not self._ours(found):
            raise NotInjected(f"there is no process of {victim} now")
        return found

    def _ours(self, pid: int) -> bool:
        """Whether it is a process of this cluster: a record may outlive its process, and the pid may be used again."""
        try:
            return pid == self.cluster.pid or self.cluster.pid in (each.pid for each in psutil.Process(pid).parents())
        except psutil.NoSuchProcess:
            return False

    def events(self) -> list[Event]:
        return self.cluster.events()

    def state_dir(self) -> Path:
        return self.cluster.state.path

    def url(self) -> str:
        return self.cluster.url

    def arm(self, failpoints: str) -> None:
        """Arm these failpoints in all processes from now on; "" disarms them. NotInjected if the cluster reads none."""
        if not self.cluster.state.failpoints.exists():
            raise NotInjected("the cluster reads no failpoints", hint="serve it with --chaos")
        write(self.cluster.state.failpoints, failpoints)

    def _rank(self, rank: int) -> int:
        """The latest process in the slot."""
        known = [
            record.pid for (slot, _), record in sorted(self.cluster.client().state().ranks.items()) if slot == rank
        ]
        return known[-1] if known else 0

    def _role(self, role: str) -> int:
        if role not in ROLES:
            raise NotInjected(f"there is no role {role!r}", hint=f"there are {', '.join(ROLES)} and 'rank N'")
        if role == "supervisor":
            return self.cluster.pid
        engine = self.cluster.client().state().engine if role.startswith("engine") else None
        if role == "engine":
            return engine.pid if engine is not None else 0
        for child in psutil.Process(self.cluster.pid).children(recursive=True):
            command = command_words(child.pid)
            if role == "etcd" and command and Path(command[0]).name == "etcd":
                return child.pid
            if role == "forkserver" and command and command[0].startswith(FORKSERVER):
                return child.pid
            standby = engine is not None and child.pid == engine.pid
            if command[1:4] == ["-m", "elastic.cli", role.removesuffix("-standby")] and not standby:
                return child.pid
        return 0
