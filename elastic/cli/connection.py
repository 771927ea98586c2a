"""Which cluster a client command talks to: its flags, and the client that they lead to."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import unquote

import msgspec

from elastic.serve.options import StateDirOptions, StoreOptions, option
from elastic.serve.state_dir import ClusterAddress, StateDir, home
from membership.base.errors import ConfigError, StoreUnavailable
from membership.base.timing import STORE_LISTENS_S
from membership.store.endpoints import PAUSE_S, parsed, require_listener

if TYPE_CHECKING:  # they take long to import, and most processes of a cluster never need them
    from elastic.cli.client import AdminClient, Client


@dataclass(frozen=True, kw_only=True)
class AdminConnection(StateDirOptions):
    """How to reach a gateway's admin port. Without flags: that of the cluster served last on this machine."""

    PANEL: ClassVar = "Connection"

    admin: str = option("", "URL of a gateway's admin port.", env="ELASTIC_ADMIN")
    admin_token: str = option(
        "", "Bearer token of the admin port.", names=("--admin-token", "--token"), env="ELASTIC_ADMIN_TOKEN"
    )

    cacert: Path | None = option(
        None, "PEM file of the authority that signed the admin port's certificate (https).", env="ELASTIC_CACERT"
    )

    def state(self) -> StateDir:
        """The state directory that was named, else that of the cluster served last."""
        return StateDir(self.state_dir) if self.state_dir else StateDir.last_served()

    @contextmanager
    def admin_client(self) -> Iterator[AdminClient]:
        """A client of the admin port. Raises ConfigError if no cluster was named or served."""
        if self.admin:
            address = ClusterAddress(cluster="", admin_url=self.admin, admin_token=self.admin_token)
        else:
            address = self.state().address()
        with _admin_client(address, self.cacert) as client:
            yield client


@dataclass(frozen=True, kw_only=True)
class Connection(AdminConnection, StoreOptions):
    """How to reach a cluster: through its store, or through a gateway's admin port."""

    def state(self) -> StateDir:
        """The state directory that was named; else that of the cluster that was named, if it is served from here; else
        that of the cluster served last. ConfigError: another cluster than the named one is served from there.
        """
        if not self.cluster:
            return super().state()
        if self.state_dir:
            named = super().state()
            self._require_named(named.address().cluster, f"from {named.path}")
            return named
        for path in (home() / self.cluster, None):
            with suppress(ConfigError):
                found = StateDir(path) if path is not None else StateDir.last_served()
                if found.address().cluster == self.cluster:
                    return found
        raise ConfigError(
            f"no cluster named {self.cluster!r} is being served from this machine",
            hint="name its --state-dir, or how it is reached: --admin URL, or --etcd URLS",
        )

    @contextmanager
    def admin_client(self) -> Iterator[AdminClient]:
        """A client of the admin port. ConfigError if no cluster was named or served, or another one answers there."""
        with super().admin_client() as client:
            if self.cluster:
                self._require_named(client.status()["cluster"], "there")
            yield client

    def _require_named(self, served: str, where: str) -> None:
        if served != self.cluster:
            raise ConfigError(
                f"cluster {served!r} is served {where}, not {self.cluster!r}", hint="leave out --cluster, or correct it"
            )

    def history(self) -> Path | None:
        """The file of the event history, if that of the cluster is on this machine: it outlives the cluster.

        ConfigError: no cluster was named or served.
        """
        if self.admin or self.etcd:
            return None
        try:
            file = self.state().events
        except ConfigError:  # it was stopped, so no address says its name: by default its directory does
            file = StateDir(home() / self.cluster).events
            if self.state_dir or not self.cluster or not file.exists():
                raise
        return file if file.exists() else None

    def client(self) -> AbstractContextManager[Client]:
        """A client of the cluster: the admin port if it was named, else the store. Raises ConfigError."""
        if self.admin:
            return self.admin_client()
        if self.etcd:
            if not self.cluster:
                raise ConfigError("--etcd needs --cluster", hint="name the cluster: --cluster NAME")
            events = StateDir(self.state_dir).events if self.state_dir else None
            named = ClusterAddress(cluster=self.cluster, etcd=self.etcd, credentials=self.credentials())
            return _store_client(named, events)
        state = self.state()
        address = state.address()
        if address.trouble:  # the store was wiped or set back; a gateway still knows the cluster as it is served
            return _admin_client(address, self.cacert)
        require_embedded(address, state)
        known = msgspec.structs.replace(address, credentials=self.credentials(address.credentials))
        return _store_client(known, state.events)


def require_embedded(address: ClusterAddress, state: StateDir, timeout_s: float = STORE_LISTENS_S) -> None:
    """StoreUnavailable if nothing comes to listen at the socket of the cluster's own etcd, as after a power cut."""
    deadline = time.monotonic() + timeout_s
    for url in (url for url in parsed(address.etcd) if url.scheme == "unix"):
        path = unquote(url.path)
        while not _listens(path):
            if time.monotonic() >= deadline:
                raise StoreUnavailable(
                    f"cluster {address.cluster!r} is not being served: nothing listens at {path}",
                    hint=f"its server was killed, or is about to start again; if it does not: elastic serve"
                    f" {address.model} --cluster {address.cluster} --state-dir {state.path}; what happened is in"
                    f" {state.events}",
                )
            time.sleep(PAUSE_S)


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # one that is stopped takes no more, once its queue is full
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT)


@contextmanager
def _admin_client(address: ClusterAddress, cacert: Path | None) -> Iterator[AdminClient]:
    from elastic.cli.client import AdminClient
    from elastic.serve.tls import pinned, trusting

    trust = None
    if address.admin_url.startswith("https:"):
        trust = trusting(cacert) if cacert else pinned(address.certificate) if address.certificate else None
    with closing(AdminClient(address.admin_url, address.token(), trust=trust)) as client:
        yield client


@contextmanager
def _store_client(address: ClusterAddress, events: Path | None) -> Iterator[Client]:
    require_listener(address.etcd)
    from elastic.cli.client import StoreClient

    with closing(address.connect()) as store:
        yield StoreClient(store, address.cluster, events)
