"""Two hosts x two ranks (network namespaces): how soon the far host's death is known, and how long streams wait.

    python -m benchmarks.hosts_faults [--ranks 20] [--hosts 3] [--cuts 3] [-o json]

Eight streams go through host a, which has the engine and the gateway. In turn: `--ranks` times SIGKILL of a rank on
host b, `--hosts` times SIGKILL of all of its processes, `--cuts` times its cable is pulled. Known: until the engine's
event `rank_masked` (of the last rank that is lost). Waits: for each stream under way, the longest time without a token
that ends after the fault. Evicted: until a view without the host is committed. It takes root.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from benchmarks.hosts_cluster import two_hosts
from chaos.faults import kill
from chaos.target.checkpoint import checkpoint
from chaos.target.host_cluster import HostCluster
from chaos.target.waiting import until
from chaos.workload.history import RequestRecord
from chaos.workload.streams import Load, Workload
from membership.base.logs import configure

WHOLE_S = 300.0
KNOWN_S = 60.0
SEEN_S = 5.0  # a wait that begins later than that after the fault is not its
LOAD = Load(streams=8, max_tokens=96, prompts=8)
Times = dict[str, list[float]]  # milliseconds, by what they are


class Trials:
    """One cluster, one fault after the other."""

    def __init__(self, cluster: HostCluster) -> None:
        self.cluster, self.found = cluster, Times()

    def note(self, what: str, *seconds: float) -> None:
        """Add what was measured."""
        self.found.setdefault(what, []).extend(each * 1000 for each in seconds)

    def rank(self, number: int) -> None:
        """SIGKILL of one."""
        there = [rank for rank in self.whole() if rank["node"] == "b"]
        victim = there[number % len(there)]
        with self.streaming():
            sent_at = kill(victim["pid"]).sent_at
            self.note("rank killed: known", self.masked({victim["incarnation"]}) - sent_at)

    def host(self) -> None:
        """SIGKILL of all of its processes."""
        lost = self.of_b()
        with self.streaming() as workload:
            at, began = time.time(), time.monotonic()
            self.cluster.kill("b")
            self.note("host killed: known", self.masked(lost) - at)
            self.evicted(began)
        self.note("host killed: streams wait", *waits(workload.records(), began))
        self.cluster.start_again("b")

    def cable(self) -> None:
        """Nothing passes; it is plugged in again once the host is evicted."""
        lost = self.of_b()
        with self.streaming() as workload:
            at, began = time.time(), time.monotonic()
            self.cluster.hosts.cut("b")
            self.note("host cut off: routed around", self.masked(lost) - at)
            self.note("host cut off: evicted", self.evicted(began))
        self.cluster.hosts.heal("b")
        self.note("host cut off: streams wait", *waits(workload.records(), began))

    def whole(self) -> list[dict[str, object]]:
        """All four ranks serve; what the status says of them."""
        until(self._steps_over_all, "steps over four ranks", WHOLE_S, guard=self.cluster.require_alive)
        return list(self.cluster.status()["ranks"])

    def of_b(self) -> set[object]:
        """Incarnations of the ranks there."""
        return {rank["incarnation"] for rank in self.whole() if rank["node"] == "b"}

    def _steps_over_all(self) -> bool:
        state = self.cluster.client().state()
        view, status = state.view, state.engine_status
        if view is None or status is None or status.token != state.engine_token:
            return False
        nodes = sorted(member.node for member in view.members)
        return (status.epoch, nodes, status.masked) == (view.epoch, ["a", "a", "b", "b"], ())

    @contextmanager
    def streaming(self) -> Iterator[Workload]:
        """Streams are under way; what they saw is complete afterwards."""
        workload = Workload(self.cluster.url, self.cluster.model_name(), LOAD)
        workload.start()
        try:
            until(lambda: len(workload.open_streams()) == LOAD.streams, "streams under way", KNOWN_S)
            yield workload
        finally:
            workload.stop()

    def masked(self, incarnations: set[object]) -> float:
        """When the engine knew of the last of them, by the wall clock."""

        def known() -> float:
            events = [e for e in self.cluster.events() if e.kind == "rank_masked"]
            times = {e.fields["incarnation"]: e.ts for e in events if e.fields["incarnation"] in incarnations}
            return max(times.values()) if times.keys() == incarnations else 0.0

        return until(known, "all lost ranks to be masked", KNOWN_S)

    def evicted(self, began: float) -> float:
        """Seconds from `began` until the view has no rank of host b."""

        def gone() -> bool:
            view = self.cluster.client().state().view
            return view is not None and all(member.node != "b" for member in view.members)

        until(gone, "a view without host b", KNOWN_S, poll_s=0.01)
        return time.monotonic() - began


def waits(records: Sequence[RequestRecord], began: float) -> list[float]:
    """Of each request that was under way then, its longest wait for a token, from the fault on. Pure."""
    found = []
    for record in records:
        if record.error:
            raise RuntimeError(f"a request failed: {record.error}")
        pairs = zip(record.token_times, record.token_times[1:], strict=False)
        after = [b - max(a, began) for a, b in pairs if b >= began and a <= began + SEEN_S]
        if after and record.started < began < record.ended:
            found.append(max(after))
    return found


def measure(ranks: int, hosts: int, cuts: int) -> Times:
    """All trials."""
    with tempfile.TemporaryDirectory(prefix="elastic-ep-bench-") as folder, ExitStack() as opened:
        trials = Trials(two_hosts(checkpoint(None, Path(folder)), Path(folder), opened))
        trials.cluster.wait_serving(4, WHOLE_S)
        for number in range(ranks):
            trials.rank(number)
        for _ in range(cuts):
            trials.cable()
        for _ in range(hosts):
            trials.host()
    return trials.found


def table(found: Times) -> dict[str, dict[str, float]]:
    """A row for each."""
    p50, p99 = ({what: round(float(np.percentile(each, p)), 1) for what, each in found.items()} for p in (50, 99))
    return {what: {"n": len(each), "p50_ms": p50[what], "p99_ms": p99[what]} for what, each in found.items()}


def main() -> None:
    """Run, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=20)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--cuts", type=int, default=3)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    configure("benchmark")  # what is logged goes to stderr
    found = measure(options.ranks, options.hosts, options.cuts)
    rows = table(found)
    if options.output == "json":
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    for what, row in rows.items():
        sys.stdout.write(f"{what:30s} " + "  ".join(f"{key} {value:g}" for key, value in row.items()) + "\n")


if __name__ == "__main__":
    main()
