"""The etcd of a site as a process to stop and start: one that the scenario owns, or the one under `elastic serve`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Protocol, runtime_checkable

from chaos.faults.base import Site, see
from chaos.faults.members import EtcdMembers, status
from chaos.faults.process import Hold
from elastic.serve.etcd_server import EtcdServer
from elastic.serve.state_dir import StateDir
from membership.base.errors import StoreUnavailable

START_TIMEOUT_S = 30.0


class Etcd(Protocol):
    """An etcd of one member that may be stopped and started."""

    @property
    def url(self) -> str:
        """Where it answers."""

    @property
    def data(self) -> Path:
        """Its data directory."""

    def down(self) -> None:
        """End it by SIGTERM; it stays down until `up`."""

    def up(self) -> None:
        """Start it."""


class OwnEtcd:
    """One that the scenario started itself."""

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self.url, self.data = server.url, server.data

    def down(self) -> None:
        self._server.stop()

    def up(self) -> None:
        if not self._server.alive:
            self._server.restart()


class ServedEtcd:
    """The one under `elastic serve`. While it is down the supervisor is stopped too, or it would start another."""

    def __init__(self, site: Site) -> None:
        self._site = site
        state = StateDir(site.state_dir())
        self.url, self.data = state.address().etcd[0], state.etcd_data / "data"
        self._supervisor: Hold | None = None

    def down(self) -> None:
        etcd = Hold(self._site.pid("etcd"), "etcd")
        supervisor = self._supervisor = Hold(self._site.pid("supervisor"), "supervisor")
        try:
            supervisor.stop()
            etcd.end(signal.SIGTERM)
        finally:
            etcd.close()

    def up(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.send(signal.SIGCONT)
            supervisor.close()
        see(lambda: answers(self.url), f"etcd at {self.url} answering again", START_TIMEOUT_S)


@runtime_checkable
class OwnsEtcd(Protocol):
    """A site whose etcd the scenario owns."""

    etcd: EtcdServer


@runtime_checkable
class OwnsMembers(Protocol):
    """A site whose etcd has several members, which the scenario owns."""

    members: EtcdMembers


def etcd_of(site: Site) -> Etcd:
    """The etcd of a site."""
    return OwnEtcd(site.etcd) if isinstance(site, OwnsEtcd) else ServedEtcd(site)


def answers(url: str) -> bool:
    """Whether etcd answers a request for its status."""
    try:
        status(url)
    except StoreUnavailable:
        return False
    return True
