"""The campaign of `elastic demo --hosts`: stream through one host's gateway, SIGKILL all of the host that is in charge,
wait for the repair on the others, start it again.

Its receipt's numbers are measured by the clients (gaps, recovery) or by the histories that the hosts keep.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.campaigns.campaign import SHOWN, START_S, Campaign, Receipt
from chaos.campaigns.kill_rank import epochs_of, uneven, until_tokens
from chaos.target.host_cluster import HostCluster, over_hosts
from chaos.target.waiting import until
from chaos.workload.history import RequestRecord, percentile
from chaos.workload.streams import FULL, Load, Workload
from membership.base.events import Event

BACK_S = 120.0
DETECTION = ("engine_elected", "rank_masked")


class KillHostReceipt(Receipt, frozen=True, kw_only=True):
    """What the demo proved. -1: it did not happen."""

    hosts: int
    killed_host: str
    killed_processes: int
    detected_ms: float  # until another host's engine was in charge
    recovered_ms: float  # until each stream that was under way had its next token
    max_token_gap_ms: float
    steady_token_gap_p99_ms: float
    restored_ms: float
    epochs: tuple[int, ...]


@dataclass(kw_only=True)
class KillHost(Campaign):
    """`ranks` over all hosts of a `HostCluster`; the first one dies, and comes back."""

    load: Load = FULL
    at_least_s: float = 0.0
    hosts: int = 0  # how many there are
    killed_host: str = ""
    killed_processes: int = 0
    killed_at: float = 0.0  # wall clock, as events have it
    killed: float = 0.0  # monotonic, as tokens have it
    restored_at: float = 0.0

    @property
    def over_hosts(self) -> HostCluster:
        """The cluster."""
        return over_hosts(self.cluster)

    def serve(self, cluster: HostCluster, model: Path) -> None:
        """Start all roles: the first host gets all that one machine has, the second the same, the others ranks."""
        first, second, *more = cluster.hosts.addresses
        self.hosts = len(cluster.hosts.addresses)
        flags: tuple[str, ...] = ("--min-agents", str(self.hosts), "--ready-timeout", f"{START_S:g}s")
        at = cluster.hosts.addresses[first]
        cluster.start(first, "serve", str(model), "--ranks", str(self.ranks), *flags, "--host", at)
        until(cluster.secret.exists, "the join secret", START_S, guard=cluster.require_alive)
        for host in (second, *more):
            cluster.join(host, "agent")
        for role in ("controller", "engine"):
            cluster.join(second, role)
        cluster.join(second, "gateway", "--host", cluster.hosts.addresses[second])

    def wait_whole(self, within_s: float = START_S) -> None:
        self.cluster.wait_serving(self.ranks, within_s, notify=self.notify)

    def act(self, workload: Workload) -> None:
        """Kill, wait, start again."""
        began, cluster = time.monotonic(), self.over_hosts
        until_tokens(workload, streams=workload.concurrency)
        where = sorted(str(rank["node"]) for rank in cluster.status()["ranks"])
        self.notify(
            f"{self.ranks} ranks on hosts {', '.join(where)}; streams go through the gateway of {cluster.gateway}"
        )
        engine = cluster.client().state().engine
        self.killed_host = cluster.first
        self.killed_at, self.killed = time.time(), time.monotonic()
        self.killed_processes = cluster.kill(cluster.first)
        led = engine is not None and engine.node == cluster.first
        among = ", the engine in charge among them" if led else ""
        self.notify(f"kill -9 host {cluster.first}: all of its {self.killed_processes} processes{among}")
        until(self._replaced, f"{self.ranks} ranks on the other hosts", BACK_S, guard=cluster.require_alive)
        self.restored_at = time.time()
        self.notify(f"host {cluster.first} is started again, and joins")
        cluster.start_again(cluster.first)
        until(lambda: cluster.first in cluster.client().state().agents, f"host {cluster.first}", BACK_S)
        time.sleep(max(0.0, began + self.at_least_s - time.monotonic()))

    def _replaced(self) -> bool:
        ranks = self.cluster.wait_serving(self.ranks, BACK_S, notify=self.notify)["ranks"]
        return all(rank["node"] != self.killed_host for rank in ranks)

    def receipt(self, events: Sequence[Event]) -> KillHostReceipt:
        """Check the finished run. Pure. `events`: those of all hosts, in the order of time."""
        steady = [gap for record in self.oracle.values() for gap in record.gaps_ms()]
        committed, epochs = epochs_of(events)
        noticed = [event.ts for event in events if event.kind in DETECTION and event.ts >= self.killed_at]
        waits = [wait for record in self.history if (wait := self._waited_ms(record)) is not None]
        broken = [*self.verdict().explained(SHOWN), *self.unproven()]
        if not self.killed_processes:
            broken.append("no host was killed")
        elif not noticed or not waits:
            broken.append(f"no host noticed the death of host {self.killed_host}, or no stream was under way")
        if not self.restored_at:
            broken.append("the cluster did not come back to full strength")
        if uneven(committed, epochs):
            broken.append(f"epochs do not rise by exactly 1: {list(epochs)}")
        return KillHostReceipt(
            **self.outcome(broken),
            hosts=self.hosts,
            killed_host=self.killed_host,
            killed_processes=self.killed_processes,
            detected_ms=round((noticed[0] - self.killed_at) * 1000.0, 1) if noticed and self.killed_at else -1.0,
            recovered_ms=round(max(waits, default=-1.0), 1),
            max_token_gap_ms=self.max_token_gap_ms(),
            steady_token_gap_p99_ms=round(percentile(steady, 0.99), 1),
            restored_ms=round((self.restored_at - self.killed_at) * 1000.0, 1) if self.restored_at else -1.0,
            epochs=epochs,
        )

    def _waited_ms(self, record: RequestRecord) -> float | None:
        """From the kill to the next token of a stream that was under way."""
        if not self.killed or not record.started < self.killed < record.ended:
            return None
        later = [at for at in record.token_times if at >= self.killed]
        return (later[0] - self.killed) * 1000.0 if later else None
