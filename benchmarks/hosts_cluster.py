"""Two hosts x two ranks for benchmarks: network namespaces of this machine, with an etcd outside of both."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from chaos.target.host_cluster import HostCluster
from chaos.target.hosts import made_hosts
from chaos.target.waiting import until
from elastic.serve.etcd_server import EtcdServer

START_S = 300.0
MANY_KILLS = ("--restart-intensity", "1000", "--restart-window", "1s")  # no slot is set aside for them


def two_hosts(model: Path, folder: Path, opened: ExitStack) -> HostCluster:
    """Two hosts x two ranks, which start to serve; engine and gateway are on host a."""
    hosts = opened.enter_context(made_hosts("a", "b"))
    etcd = opened.enter_context(EtcdServer(folder / "etcd", address=hosts.outside))
    two = HostCluster(hosts, etcd.url, folder, gateway="a")
    opened.callback(two.close)
    at = ("--capacity", "2", "--min-agents", "2", "--host", hosts.addresses["a"])
    two.start("a", "serve", str(model), "--ranks", "4", *at, *MANY_KILLS)
    until(two.secret.exists, "the join secret", START_S, guard=two.require_alive)
    two.join("b", "agent", "--capacity", "2")
    return two
