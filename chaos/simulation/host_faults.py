"""Faults of hosts and of the network between them, made as those of `faults.py`. Drawn where hosts are simulated."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from chaos.simulation.cluster import Cluster
from chaos.simulation.faults import NOTHING, Action
from chaos.simulation.network import ETCD, Way

HOLDS_S = (0.1, 0.25, 0.4, 1.3, 3.0, 6.0)  # shorter than what makes a host suspected, than its lease, and longer
SLOW_S, LOSSY = (0.02, 0.05), (0.05, 0.3)

HOST_FAULTS: dict[str, Action] = {}
ENDS = frozenset(
    {"kill-host", "lose-host"}
)  # of processes: what was killed is started again, but not at once each time


def host_fault(function: Action) -> Action:
    """Register it. The function's name is its kind."""
    HOST_FAULTS[function.__name__.replace("_", "-")] = function
    return function


def both(one: str, others: Iterable[str]) -> list[Way]:
    """All ways between one host and others."""
    return [way for other in others for way in ((one, other), (other, one))]


def _cut(cluster: Cluster, random: Random, ways: list[Way], what: str) -> str:
    seconds = random.choice(HOLDS_S)
    cluster.network.cut(ways)
    cluster.clock.after(seconds, cluster.network.heal, ways)
    return f"{what} for {seconds:g} s"


@host_fault
def cut_link(cluster: Cluster, random: Random) -> str:
    """Two hosts do not reach each other; the others reach both."""
    one, two = random.sample(cluster.network.hosts, 2)
    return _cut(cluster, random, both(one, [two]), f"hosts {one} and {two} do not reach each other")


@host_fault
def mute_link(cluster: Cluster, random: Random) -> str:
    """One-way: one of two hosts does not reach the other, which reaches it."""
    one, two = random.sample(cluster.network.hosts, 2)
    return _cut(cluster, random, [(one, two)], f"host {one} does not reach host {two}, which reaches it")


@host_fault
def isolate_host(cluster: Cluster, random: Random) -> str:
    """Its cable is pulled: it reaches no other host, nor the store."""
    host = random.choice(cluster.network.hosts)
    others = [each for each in (*cluster.network.hosts, ETCD) if each != host]
    return _cut(cluster, random, both(host, others), f"host {host} reaches no other")


@host_fault
def half_open_host(cluster: Cluster, random: Random) -> str:
    """What a host sends is lost, or what is sent to it."""
    host = random.choice(cluster.network.hosts)
    others = [each for each in (*cluster.network.hosts, ETCD) if each != host]
    if random.random() < 0.5:
        return _cut(cluster, random, [(host, other) for other in others], f"nothing from host {host} arrives")
    return _cut(cluster, random, [(other, host) for other in others], f"nothing arrives at host {host}")


@host_fault
def divide_host(cluster: Cluster, random: Random) -> str:
    """A host and the others do not reach each other, and all of them reach the store: an engine on either side."""
    host = random.choice(cluster.network.hosts)
    others = [each for each in cluster.network.hosts if each != host]
    return _cut(cluster, random, both(host, others), f"host {host} reaches the store alone")


@host_fault
def cut_store(cluster: Cluster, random: Random) -> str:
    """A host does not reach the store, or has no answers: writes take effect, and none is answered."""
    host = random.choice(cluster.network.hosts)
    ways = random.choice([both(host, [ETCD]), [(ETCD, host)], [(host, ETCD)]])
    return _cut(cluster, random, ways, f"host {host} is cut off from the store ({len(ways)} of 2 ways)")


@host_fault
def slow_link(cluster: Cluster, random: Random) -> str:
    """All between two hosts takes longer."""
    one, two = random.sample(cluster.network.hosts, 2)
    slower_s = random.choice(SLOW_S)
    for way in both(one, [two]):
        cluster.network.slow_down(way, slower_s, 4.0)
    return f"between hosts {one} and {two} all takes {slower_s * 1000:.0f} ms more for 4 s"


@host_fault
def lossy_link(cluster: Cluster, random: Random) -> str:
    """Packets between two hosts are lost, and sent again."""
    one, two = random.sample(cluster.network.hosts, 2)
    share = random.choice(LOSSY)
    for way in both(one, [two]):
        cluster.network.lose(way, share, 4.0)
    return f"between hosts {one} and {two} {share:.0%} of packets are lost for 4 s"


@host_fault
def kill_host(cluster: Cluster, random: Random) -> str:
    """All processes of a host end at once; its kernel says so. They are started again a little later."""
    host = random.choice(cluster.network.hosts)
    found = cluster.processes_of(host)
    for process in found:
        cluster.kill(process)
    return f"all of host {host} is killed" if found else NOTHING


@host_fault
def lose_host(cluster: Cluster, random: Random) -> str:
    """Its power fails: all of it ends, and nothing says so. It is back later."""
    host, seconds = random.choice(cluster.network.hosts), random.choice(HOLDS_S)
    if cluster.dark[host]:
        return NOTHING
    ways = both(host, [each for each in (*cluster.network.hosts, ETCD) if each != host])
    cluster.lose_power(host, ways)
    cluster.clock.after(seconds, cluster.power_back, host, ways)
    return f"host {host} has no power for {seconds:g} s"
