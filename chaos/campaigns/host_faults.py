"""One fault of a soak over hosts: how it is injected, what shows it, and how it is taken back.

Rules drop packets where they arrive, so that their sender learns nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Literal

from chaos.campaigns.host_bursts import ETCD, HostFault
from chaos.campaigns.host_bursts import HostFaultKind as Kind
from chaos.faults.base import Injected, NotInjected, see
from chaos.faults.netns import inside
from chaos.faults.nftables import Rule, Table
from chaos.faults.process import Hold
from chaos.faults.signals import kill
from chaos.target.host_cluster import HostCluster
from membership.store.records import ClusterState

RATE = "1mbit"
Rules = list[tuple[str, Rule]]  # each with the host where it is


class Injection:
    """One fault into the cluster, and its end. `before`: what the cluster was like before the burst."""

    def __init__(self, cluster: HostCluster, fault: HostFault, before: ClusterState) -> None:
        self.cluster, self.fault, self.before = cluster, fault, before
        self.killed = set[int]()  # incarnations that others must follow
        self.agents = set[int]()  # process ids of agents that others must follow
        self.injected: Injected | None = None
        self._pid = 0
        self._heals = ExitStack()

    def inject(self) -> Injected:
        """See that it happens, or NotInjected."""
        at, kind = time.time(), self.fault.kind
        proof = self._kill() if kind.startswith("kill-") and kind is not Kind.KILL_HOST else self._affect()
        self.injected = Injected(
            fault=kind, victim=self._victim(), at=at, seen_at=time.time(), proof=proof, pid=self._pid
        )
        return self.injected

    def heal(self) -> None:
        """Take back what can be; what was killed is started again."""
        self._heals.close()

    def _victim(self) -> str:
        of_process = {Kind.KILL_ENGINE: "engine", Kind.KILL_CONTROLLER: "controller", Kind.FREEZE_ETCD: "etcd"}
        return of_process.get(self.fault.kind, f"host {self.fault.host}")

    def _affect(self) -> str:
        """Hosts, links, and what is stopped."""
        host, hosts = self.fault.host, self.cluster.hosts
        match self.fault.kind:
            case Kind.KILL_HOST:
                return self._power()
            case Kind.POWER:
                hosts.cut(host)
                try:
                    return self._power()
                finally:  # taken back before the host is started
                    self._heals.callback(hosts.heal, host)
            case Kind.CABLE:
                hosts.cut(host)
                self._heals.callback(hosts.heal, host)
                return "eth0 is down"
            case Kind.SLOW:
                hosts.slow(host, RATE)
                self._heals.callback(hosts.fast, host)
                return f"{see(partial(hosts.slowed, host), 'a packet that waits')} packets had to wait"
            case Kind.STOP_RANK | Kind.FREEZE_ETCD:
                self._pid = self._etcd() if self.fault.kind is Kind.FREEZE_ETCD else self._rank()
                hold = self._heals.enter_context(closing(Hold(self._pid, self._victim())))
                proof = hold.stop()
                self._heals.callback(hold.resume)
                return proof
            case _:
                return self._filter(rules(self.fault, hosts.addresses))

    def _power(self) -> str:
        """Kill all of the host; it is started again when this is healed."""
        self._agent_dies()
        number = self.cluster.kill(self.fault.host)
        self._heals.callback(self.cluster.start_again, self.fault.host)
        return f"{number} processes are gone"

    def _filter(self, wanted: Rules) -> str:
        """Set rules, and see that each of them meets packets."""
        tables = list[tuple[str, Table]]()
        for host in dict.fromkeys(host for host, _ in wanted):
            namespace = self.cluster.hosts.namespace(host)
            table = inside(namespace, partial(Table, [rule for where, rule in wanted if where == host]))
            self._heals.callback(inside, namespace, table.drop)
            tables.append((namespace, table))
        met = see(lambda: _packets(tables), "packets that the rules meet")
        return f"{met} packets met the rules"

    def _etcd(self) -> int:
        """Process of the host's member, or of the only one."""
        members = self.cluster.members
        return members[self.fault.host if self.fault.host in members else ETCD].server.pid

    def _rank(self) -> int:
        """Process of a rank there, or of any if the host has none; NotInjected if there is none at all."""
        ranks = [rank for rank in self.before.ranks.values() if rank.pid]
        here = [rank for rank in ranks if rank.node == self.fault.host] or ranks
        if not here:
            raise NotInjected("there is no rank")
        chosen = sorted(here, key=lambda rank: rank.rank)[int(self.fault.chance * len(here))]
        return chosen.pid

    def _kill(self) -> str:
        """SIGKILL to one process."""
        host, role = self.fault.host, self.fault.kind.removeprefix("kill-")
        self._pid = self._rank() if role == "rank" else self._pid_of(role)
        if role == "rank":
            self.killed |= {r.incarnation for r in self.before.ranks.values() if r.pid == self._pid}
        if role == "agent":
            self._agent_dies()
        kill(self._pid)
        if self.cluster.is_started(host, role):
            self.cluster.forget_dead(host, role)
            self._heals.callback(self.cluster.start_again, host)
        return "its pidfd is readable: it is gone"

    def _agent_dies(self) -> None:
        """The host's, and so its ranks."""
        self.agents |= {agent.pid for node, agent in self.before.agents.items() if node == self.fault.host}
        self.killed |= {r.incarnation for r in self.before.ranks.values() if r.node == self.fault.host}

    def _pid_of(self, role: str) -> int:
        """Process of the role in charge, or of the host's agent; NotInjected if there is none."""
        state = self.before
        if role == "agent":
            found = state.agents[self.fault.host].pid if self.fault.host in state.agents else 0
        elif role == "engine":
            found = state.engine.pid if state.engine is not None else 0
        else:
            leader = self.cluster.leader()
            found = leader.pid if leader is not None else 0
        if not found:
            raise NotInjected(f"there is no {role} now")
        return found


def rules(fault: HostFault, addresses: Mapping[str, str]) -> Rules:
    """What is dropped, lost or reset, and at which host. Pure."""
    one, two = fault.host, fault.peer
    match fault.kind:
        case Kind.ISOLATE | Kind.DIVIDE:
            others = [each for each in addresses if each not in (one, ETCD if fault.kind is Kind.DIVIDE else one)]
            pairs = [pair for other in others for pair in ((other, one), (one, other))]  # as `cut_off`: its own first
            return _at_receivers(pairs, addresses, "drop")
        case Kind.CUT:
            return _at_receivers([(one, two), (two, one)], addresses, "drop")
        case Kind.MUTE:
            return _at_receivers([(one, two)], addresses, "drop")
        case Kind.LOSSY:
            return _at_receivers([(one, two), (two, one)], addresses, "lose")
        case Kind.RESET:
            return [(at, Rule("output", addresses[to], "reset")) for at, to in ((one, two), (two, one))]
    raise ValueError(f"{fault.kind} is no fault of a link")


def _at_receivers(
    pairs: Sequence[tuple[str, str]], addresses: Mapping[str, str], verdict: Literal["drop", "lose"]
) -> Rules:
    return [(to, Rule("input", addresses[of], verdict)) for of, to in pairs]


def _packets(tables: Sequence[tuple[str, Table]]) -> int:
    """How many met the rules: a cut is one as soon as one end's packets are dropped."""
    return sum(sum(inside(namespace, table.packets)) for namespace, table in tables)
