"""A cluster over several hosts of this machine's making (`hosts.py`), with an etcd outside of all of them.

Each process is started as a person would type it on that host, with a state directory of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from chaos.faults.members import Member
from chaos.target.cluster import Cluster
from chaos.target.hosts import Hosts
from elastic.serve.state_dir import ClusterAddress, StateDir
from membership.base import starter
from membership.base.errors import ElasticError
from membership.base.events import Event, EventLog
from membership.store.codec import decode
from membership.store.keys import Keys
from membership.store.records import LeaderRecord

NAME = "moe"
PYTHON = [sys.executable, "-m", "elastic.cli"]
STOP_S = 60.0
KILLED_S = 30.0


class HostCluster(Cluster):
    """`gateway`: the host whose gateway is used. The first of `hosts` makes the join secret, by `elastic serve`."""

    def __init__(
        self, hosts: Hosts, etcd: str, folder: Path, gateway: str, members: Mapping[str, Member] | None = None
    ) -> None:
        """`etcd`: its URLs, comma-separated. `members`: those of it that are on these hosts."""
        self.first = next(iter(hosts.addresses))
        super().__init__(StateDir(folder / self.first))
        self.hosts, self.etcd, self.folder, self.gateway = hosts, etcd, folder, gateway
        self.members = dict(members or {})
        self._started: dict[tuple[str, str], tuple[subprocess.Popen[bytes], Path]] = {}
        self._commands: dict[tuple[str, str], tuple[str, ...]] = {}

    @property
    def url(self) -> str:
        return f"http://{self.hosts.addresses[self.gateway]}:8000"

    @property
    def address(self) -> ClusterAddress:
        """Also where no `elastic serve` says so."""
        return ClusterAddress(cluster=NAME, etcd=tuple(self.etcd.split(",")))

    @property
    def secret(self) -> Path:
        """The file with the join secret."""
        return self.folder / self.first / "join-secret"

    def events(self) -> list[Event]:
        """Of all hosts' histories, in the order of time."""
        paths = [StateDir(self.folder / host).events for host in self.hosts.addresses]
        return sorted((event for path in paths for event in EventLog.read(path)), key=lambda event: event.ts)

    def join(self, host: str, role: str, *flags: str) -> None:
        """Start a role there that is given the join secret."""
        self.start(host, role, "--join-secret-file", str(self.secret), *flags)

    def start(self, host: str, *command: str) -> None:
        """Also in the place of one that has ended."""
        self._commands[host, command[0]] = command
        state = self.folder / host
        state.mkdir(exist_ok=True)
        log = state / f"{command[0]}-output.log"
        environ = {"XDG_STATE_HOME": str(state / "home"), starter.ENV: starter.named()}
        at = ["--etcd", self.etcd, "--cluster", NAME, "--state-dir", str(state)]
        at += ["--advertise", self.hosts.addresses[host]]
        before = self._started.get((host, command[0]))
        if before is not None:
            before[0].wait(timeout=STOP_S)
        self._started[host, command[0]] = self.hosts.start(host, [*PYTHON, *command, *at], log, environ), log

    def is_started(self, host: str, command: str) -> bool:
        """Whether we have started it there, and it was not killed or stopped by us since."""
        return (host, command) in self._started

    def start_again(self, host: str) -> None:
        """What was started there and was killed since; first its member of etcd."""
        if host in self.members and not self.members[host].server.alive:
            self.members[host].restart()
        for (where, role), command in list(self._commands.items()):
            if where == host and (host, role) not in self._started:
                self.start(host, *command)

    def leader(self) -> LeaderRecord | None:
        """The controller in charge."""
        self.client()
        found = self._store.get(Keys(NAME).leader) if self._store is not None else None
        return decode(found.value, LeaderRecord) if found else None

    def forget_dead(self, host: str, role: str) -> None:
        """It was killed: that it has ended is no failure."""
        self._started.pop((host, role))[0].wait(timeout=STOP_S)

    def stop(self, host: str, command: str) -> int:
        """SIGTERM, as by an operator; the exit code."""
        process, _ = self._started.pop((host, command))
        process.terminate()
        return process.wait(timeout=2 * STOP_S)

    def kill(self, host: str) -> int:
        """SIGKILL to all processes there; how many there were."""
        killed = self.hosts.kill(host)
        for place in [each for each in self._started if each[0] == host]:
            self.forget_dead(*place)
        return killed

    def require_alive(self) -> None:
        for (host, command), (process, log) in self._started.items():
            if process.poll() is not None:
                said = log.read_text(errors="replace", encoding="utf-8").strip().splitlines()[-3:]
                raise ElasticError(f"{command} on host {host} ended with code {process.returncode}: {' | '.join(said)}")

    def close(self) -> None:
        super().close()
        started = [process for process, _ in self._started.values()]
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=KILLED_S)


def over_hosts(cluster: Cluster) -> HostCluster:
    """The cluster, whose hosts are to fail."""
    if not isinstance(cluster, HostCluster):
        raise TypeError("hosts fail in a cluster of several")
    return cluster
