"""The hosts that a soak makes for itself, with an etcd: on a host of its own, or a member of it on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from chaos.campaigns.host_bursts import ETCD
from chaos.faults.members import EtcdMembers
from chaos.faults.netns import inside
from chaos.target.host_cluster import HostCluster
from chaos.target.hosts import made_hosts

T = TypeVar("T")


@dataclass
class Namespace:
    """Where a member of etcd runs."""

    name: str
    address: str

    def run(self, work: Callable[[], T]) -> T:
        """Do it there."""
        return inside(self.name, work)


@contextmanager
def own_hosts(names: Sequence[str], folder: Path, *, etcd_on_hosts: bool) -> Iterator[HostCluster]:
    """Hosts and an etcd; nothing else is started. The last host's gateway is used."""
    far = () if etcd_on_hosts else (ETCD,)
    with ExitStack() as opened:
        hosts = opened.enter_context(made_hosts(*names, *far))
        places = {name: Namespace(hosts.namespace(name), hosts.addresses[name]) for name in far or names}
        etcd = opened.enter_context(EtcdMembers(folder / "etcd-members", places=list(places.values())))
        members = dict(zip(places, etcd.members, strict=True))
        cluster = HostCluster(hosts, ",".join(etcd.urls), folder, names[-1], members)
        opened.callback(cluster.close)
        yield cluster
