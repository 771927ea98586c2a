"""The soak over several hosts: hosts, links, roles and ranks fail at random moments under load, some of them at a time.

Each fault is proven by what the kernel says of processes, or has counted of packets; one that was not seen to happen
does not count. Clients use the gateway of the last host, which keeps its power.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from chaos.campaigns.campaign import START_S, LongReceipt
from chaos.campaigns.host_bursts import ETCD, NETWORK, PHASES, Cell, HostBurst, HostFault, bursts, matrix
from chaos.campaigns.host_faults import Injection
from chaos.campaigns.host_phases import PhaseUnderWay
from chaos.campaigns.recorded import Recorded
from chaos.faults.base import Injected, NotInjected
from chaos.record.record import AnyLine, Read
from chaos.target.host_cluster import HostCluster, over_hosts
from chaos.target.waiting import until
from chaos.workload.history import percentile
from chaos.workload.streams import Load, Workload
from membership.base.errors import NoAnswer
from membership.base.timing import LEASE_TTL_S

FLAGS = ("--restart-intensity", "1000", "--restart-window", "1s", "--capacity", "2", "--ready-timeout", f"{START_S:g}s")
LOAD = Load(streams=6, prompts=12, lengths=(4, 24, 8, 60, 12, 6))
CONVERGED_S = 10.0  # promised after healing
LAST_READS = 40  # of the store, by which it is judged
WHOLE_S = 120.0  # what a run allows, on a machine that is busy


class HostSoakReceipt(LongReceipt, frozen=True, kw_only=True):
    """What the soak proved. All faults that are counted were seen to happen."""

    hosts: int
    faults: int
    kinds: dict[str, int]
    cells: int  # of the matrix of network faults and phases, that were met
    not_injected: int
    non_2xx: int
    converged_p50_ms: float  # from the end of a burst to full strength
    converged_max_ms: float
    late: int  # bursts after which that took longer than is promised
    max_token_gap_ms: float
    store_read_ms: float  # of the last reads of etcd, the one in the middle


def last_read_s(lines: Iterable[AnyLine]) -> float:
    """How long reads of the store took in the end: the median of the last ones, 0 if there were none."""
    took = [line.ended - line.began for line in lines if isinstance(line, Read)]
    return statistics.median(took[-LAST_READS:]) if took else 0.0


def starved(read_s: float) -> list[str]:
    """What a run that broke has to say of its store: one that is slower than leases takes every office away."""
    if read_s < LEASE_TTL_S / 2:
        return []
    return [
        f"etcd had no processor or disk: a read took {read_s:.1f} s in the end, and a lease lasts {LEASE_TTL_S:g} s"
    ]


@dataclass(kw_only=True)
class HostSoak(Recorded):
    """Burst after burst over a `HostCluster`, until there were so many faults, or the time is over."""

    faults: int = 0
    limit_s: float = 0.0  # 0: none
    matrix: bool = False  # each fault of a network in each phase, instead of what is drawn
    load: Load = LOAD
    hosts: tuple[str, ...] = ()
    injected: list[tuple[HostFault, Injected]] = field(default_factory=list)
    cells: set[Cell] = field(default_factory=set)  # met so far
    missed: list[str] = field(default_factory=list)  # faults that were not seen to happen
    converged_ms: list[float] = field(default_factory=list)

    @property
    def over_hosts(self) -> HostCluster:
        """The cluster."""
        return over_hosts(self.cluster)

    def serve(self, cluster: HostCluster, model: Path) -> None:
        """`elastic serve` on each host but the last, which has an agent and the gateway that clients use."""
        first, *more = self.hosts
        flags = (str(model), "--ranks", str(self.ranks), "--min-agents", str(len(self.hosts)), *FLAGS)
        cluster.start(first, "serve", *flags, "--host", cluster.hosts.addresses[first])
        until(cluster.secret.exists, "the join secret", START_S, guard=cluster.require_alive)
        for host in more[:-1]:
            cluster.join(host, "serve", *flags, "--host", cluster.hosts.addresses[host])
        cluster.join(more[-1], "agent", "--capacity", "2")
        cluster.join(more[-1], "gateway", "--host", cluster.hosts.addresses[more[-1]])

    def wait_whole(self, within_s: float = START_S) -> None:
        self.cluster.wait_serving(self.ranks, within_s, notify=self.notify)

    def act(self, workload: Workload) -> None:
        """Burst after burst, each followed by full strength."""
        began = time.monotonic()
        far = [ETCD] if ETCD in self.over_hosts.hosts.addresses else []
        drawn = (self.seed, self.hosts, self.hosts[-1], far)
        for burst in matrix(*drawn, self.cells) if self.matrix else bursts(*drawn):
            over = self.limit_s and time.monotonic() > began + self.limit_s
            if over or len(self.injected) >= self.faults:
                break
            time.sleep(burst.pause_s)
            self._inject(burst)
            self.notify(
                f"{len(self.injected)} faults; {', '.join(map(str, burst.faults))} ({burst.phase}): whole after "
                f"{self.converged_ms[-1]:.0f} ms; {len(workload.records())} requests ended"
            )

    def _inject(self, burst: HostBurst) -> None:
        """Inject it, take it back, wait for full strength."""
        before = self.over_hosts.client().state()
        killed, agents = set[int](), set[int]()
        phase = PhaseUnderWay(self.over_hosts, burst.phase, self.ranks, burst.faults[0].chance)
        with ExitStack() as heals:
            for number, fault in enumerate(burst.faults):
                if number:
                    time.sleep(burst.delay_s)
                try:
                    injection = Injection(self.over_hosts, fault, before)
                    heals.callback(self._heal, injection)
                    injected = injection.inject()
                except (NotInjected, NoAnswer) as error:
                    self.missed.append(f"{fault}: {error}")
                    self.notify(f"not injected: {fault}: {error}")
                    continue
                killed |= injection.killed
                agents |= injection.agents
                self.injected.append((fault, injected))
                self.note(injected)
                if not number:
                    phase.begin(before)
                    self.cells |= {(fault.kind, burst.phase)} & set(product(NETWORK, PHASES))
            time.sleep(max(fault.hold_s for fault in burst.faults))
        healed = time.monotonic()
        phase.settle()
        until(
            lambda: self._whole(killed | phase.killed, agents),
            lambda: f"{self.ranks} ranks after {self._said(burst)}",
            WHOLE_S,
        )
        self.converged_ms.append((time.monotonic() - healed) * 1000)

    def _heal(self, injection: Injection) -> None:
        injection.heal()
        if injection.injected is not None:
            self.note_healed(injection.injected)

    def _said(self, burst: HostBurst) -> str:
        return ", ".join(map(str, burst.faults))

    def _whole(self, killed: set[int], agents: set[int]) -> bool:
        """Whether all hosts are there, and steps go over all ranks: none of those that were killed."""
        status = self.cluster.wait_serving(self.ranks, WHOLE_S)
        state = self.cluster.client().state()
        if state.view is None or state.engine_status is None or state.engine_status.token != state.engine_token:
            return False
        steps = state.engine_status.epoch == state.view.epoch and not state.engine_status.masked
        old = killed & {rank["incarnation"] for rank in status["ranks"]}
        there = {node for node, agent in state.agents.items() if agent.pid not in agents}
        return steps and not old and set(self.hosts) <= there

    def after(self) -> None:
        super().after()
        self.verify_strength(self.converged_ms)

    def receipt(self) -> HostSoakReceipt:
        """Check the finished run. Pure."""
        broken = [*self.broken(), *self.refusals()]
        if not self.injected:
            broken.append("no fault was injected")
        if self.matrix and not self.limit_s:
            left = sorted(set(product(NETWORK, PHASES)) - self.cells)
            broken += [f"{kind} during {phase} was not seen to happen" for kind, phase in left]
        read_s = last_read_s(self.recorder.lines() if self.recorder is not None else ())
        if broken:
            broken += starved(read_s)
        return HostSoakReceipt(
            **self.long_outcome(broken, max(0, self.epochs)),
            hosts=len(self.hosts),
            faults=len(self.injected),
            kinds=dict(sorted(Counter(fault.kind.value for fault, _ in self.injected).items())),
            cells=len(self.cells),
            not_injected=len(self.missed),
            non_2xx=self.refused,
            converged_p50_ms=round(percentile(self.converged_ms, 0.5), 1),
            converged_max_ms=round(max(self.converged_ms, default=0.0), 1),
            late=sum(each > CONVERGED_S * 1000 for each in self.converged_ms),
            max_token_gap_ms=self.max_token_gap_ms(),
            store_read_ms=round(read_s * 1000, 1),
        )
