"""etcds that a scenario owns and may break at will: one behind a proxy, or one of several members."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from chaos.faults.proxy import TcpProxy
from chaos.faults.site import ServedSite
from chaos.target.cluster import ServedCluster
from elastic.serve.etcd_server import START_TIMEOUT_S, EtcdServer, free_ports, http_client
from membership.base.errors import ConfigError, StoreUnavailable

ASK_TIMEOUT_S = 5.0
CLIENT_PORT, PEER_PORT = 2379, 2380  # in a place of its own
T = TypeVar("T")


class Place(Protocol):
    """Where a member runs: `chaos.faults.netns.Host`, or this machine."""

    address: str

    def run(self, work: Callable[[], T]) -> T:
        """Do it there."""


class Here:
    """This machine's loopback."""

    address = "127.0.0.1"

    def run(self, work: Callable[[], T]) -> T:
        return work()


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A member's own status."""

    cluster_id: int
    member_id: int
    leader: int  # its id; 0: it knows none
    revision: int
    size: int  # of its database, in bytes


def call(url: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Ask etcd's JSON gateway; StoreUnavailable if there is no good answer."""
    try:
        with http_client(url, ASK_TIMEOUT_S) as client:
            answer = client.post(f"/v3/{path}", json=body or {})
    except httpx.HTTPError as error:
        raise StoreUnavailable(f"etcd at {url} did not answer {path}: {error!r}") from error
    if answer.status_code != 200:
        raise StoreUnavailable(f"etcd at {url} refused {path}: {answer.text[:200]}")
    found: dict[str, Any] = answer.json()
    return found


def status(url: str) -> Status:
    """The status of the member at `url`."""
    said = call(url, "maintenance/status")
    header = said["header"]
    return Status(
        cluster_id=int(header["cluster_id"]),
        member_id=int(header["member_id"]),
        leader=int(said.get("leader", 0)),
        revision=int(header.get("revision", 0)),
        size=int(said.get("dbSize", 0)),
    )


class Member:
    """One of several members."""

    def __init__(self, name: str, server: EtcdServer, place: Place) -> None:
        self.name, self.server, self.place = name, server, place

    @property
    def url(self) -> str:
        """Where clients connect."""
        return self.server.url

    def status(self) -> Status:
        """Its own status."""
        return self.place.run(lambda: status(self.url))

    def kill(self) -> None:
        """SIGKILL; `restart` brings it back with its data."""
        self.server.kill()

    def restart(self) -> None:
        """Start it again."""
        self.place.run(self.server.restart)


class EtcdMembers:
    """An etcd of several members, each in its place: as many as `places`, else `count`. A context manager."""

    def __init__(self, folder: Path, count: int = 3, *, places: Sequence[Place] = ()) -> None:
        own = list(places) or [Here()] * count
        free = iter([CLIENT_PORT, PEER_PORT] * len(own) if places else free_ports(2 * count))
        ports = [(next(free), next(free)) for _ in own]
        peers = ",".join(
            f"m{i}=http://{place.address}:{peer}" for i, (place, (_, peer)) in enumerate(zip(own, ports, strict=True))
        )
        token = secrets.token_hex(8)
        self.members = [self._member(f"m{i}", folder, own[i], ports[i], peers, token) for i in range(len(own))]

    @staticmethod
    def _member(name: str, folder: Path, place: Place, ports: tuple[int, int], peers: str, token: str) -> Member:
        flags = {"name": name, "initial-cluster": peers, "initial-cluster-token": token}
        return Member(name, EtcdServer(folder / name, address=place.address, ports=ports, flags=flags), place)

    @property
    def urls(self) -> list[str]:
        """Where clients connect."""
        return [member.url for member in self.members]

    def leader(self) -> Member:
        """The member that leads by its own status; StoreUnavailable if there is none."""
        for member in self.members:
            if member.server.alive and (said := member.status()).leader == said.member_id:
                return member
        raise StoreUnavailable(f"none of {', '.join(self.urls)} leads")

    def __enter__(self) -> EtcdMembers:
        """Start them together: none is healthy without a quorum."""
        with ExitStack() as undo, ThreadPoolExecutor(len(self.members)) as starters:
            undo.callback(self.__exit__)
            starts = [starters.submit(member.place.run, member.server.start) for member in self.members]
            for start in starts:
                start.result(START_TIMEOUT_S + ASK_TIMEOUT_S)
            undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self.members:
            if member.server.started:
                member.server.kill()
                member.server.stop()


class ProxiedEtcd:
    """An etcd of one member behind a proxy, for `elastic serve --etcd URL`. A context manager."""

    def __init__(self, folder: Path, *, flags: Mapping[str, str] | None = None) -> None:
        self.server = EtcdServer(folder, flags=flags)
        self._opened = ExitStack()

    @property
    def url(self) -> str:
        """The proxy's, for clients that the faults are meant for. `server.url` is for the others."""
        return self.proxy.url

    def __enter__(self) -> ProxiedEtcd:
        with ExitStack() as opened:
            opened.enter_context(self.server)
            self.proxy = opened.enter_context(TcpProxy(*_address(self.server.url), name="etcd"))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened.close()


class ProxiedSite(ServedSite):
    """A cluster that was started with `--etcd` through a proxy. `gateway`: the proxy of the API's clients, if any."""

    def __init__(self, cluster: ServedCluster, etcd: ProxiedEtcd, gateway: TcpProxy | None = None) -> None:
        super().__init__(cluster)
        self.etcd = etcd.server
        self.proxies = {"etcd": etcd.proxy} | ({"gateway": gateway} if gateway is not None else {})

    def pid(self, victim: str) -> int:
        """See Site; etcd is not the cluster's own."""
        return self.etcd.pid if victim == "etcd" else super().pid(victim)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.hostname is None or parts.port is None:
        raise ConfigError(f"{url} has no host and port")
    return parts.hostname, parts.port
