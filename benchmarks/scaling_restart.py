"""Row of `scaling.py` that compares a scale with a restart: `elastic serve` stopped, and started with the new size."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import httpx

from benchmarks.recovery_cluster import MAX_TOKENS, POLL_S, OurCluster
from benchmarks.recovery_report import Report, say
from benchmarks.scaling_cluster import LARGE, OPS_S, SMALL, STREAMS, Span
from chaos.workload.history import RequestRecord, compare, percentile
from chaos.workload.streams import FULL, Load, Workload
from elastic.demo.model import write_demo_model
from elastic.serve.etcd_server import free_ports
from membership.base.errors import WaitTimeout

RETRY_S = 0.02
LOAD = Load(prompts=FULL.prompts, streams=STREAMS, max_tokens=MAX_TOKENS)
RESTARTS = 6  # cycles of the other rows per pair of restarts


class PatientWorkload(Workload):
    """Clients that try again when no gateway answers, as behind a load balancer; and when each failed."""

    def __init__(self, url: str, model: str) -> None:
        super().__init__(url, model, LOAD)
        self.failed: list[tuple[float, RequestRecord]] = []

    async def _request(self, client: httpx.AsyncClient, number: int, prompt: int) -> RequestRecord:
        record = await super()._request(client, number, prompt)
        if not record.complete:
            self.failed.append((time.monotonic(), record))
            await asyncio.sleep(RETRY_S)
        return record

    def until_streaming(self, timeout_s: float = 120.0) -> None:
        """Wait until every stream is in the middle of a request."""
        deadline = time.monotonic() + timeout_s
        while sum(n > 0 for n in self.open_streams().values()) < self.concurrency:
            if time.monotonic() > deadline:
                raise WaitTimeout(f"streams do not flow: {self.open_streams()}")
            time.sleep(POLL_S)


class Service:
    """One address, at which one `elastic serve` after the other answers."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ports, self._runs = folder, free_ports(2), 0
        self.cluster: OurCluster | None = None

    def start(self, ranks: int) -> OurCluster:
        """`elastic serve` with this size and an empty state directory, until it serves in full."""
        self._runs += 1
        here = self._folder / f"state{self._runs}"
        self.cluster = OurCluster(
            self._folder / "model", ranks, state_dir=here, ports=tuple(self._ports), roles="elastic.cli"
        )
        self.cluster.__enter__()
        self.cluster.wait_serving(ranks, timeout_s=180.0)
        return self.cluster

    def stop(self) -> None:
        """As an operator would: SIGTERM."""
        if self.cluster is not None:
            self.cluster.__exit__()
            self.cluster = None


@contextmanager
def service() -> Iterator[Service]:
    """A model, and an address to serve it at."""
    with tempfile.TemporaryDirectory(prefix="elastic-ep-scaling-") as folder:
        write_demo_model(Path(folder) / "model")
        made = Service(Path(folder))
        try:
            yield made
        finally:
            made.stop()


def silence_ms(tokens: Sequence[float], span: Span) -> float:
    """The longest time without any token of any stream that overlaps this time. `tokens` are sorted."""
    return max(((b - a) * 1000 for a, b in pairwise(tokens) if b > span[0] and a < span[1]), default=0.0)


def row_restart(report: Report, cycles: int, seed: int) -> None:
    """Under the same clients: up and down by scaling, up and down by a restart."""
    scales: list[Span] = []
    restarts: list[Span] = []
    with service() as at:
        cluster = at.start(SMALL)
        model = cluster.model_name()
        oracle = {r.prompt: r for r in Workload(cluster.url, model, LOAD).run_once()}
        clients = PatientWorkload(cluster.url, model)
        clients.start()
        clients.until_streaming()
        for number in range(max(1, cycles // RESTARTS)):
            for target in (LARGE, SMALL):
                began = time.monotonic()
                at.cluster.scale(target, OPS_S)  # type: ignore[union-attr]
                scales.append((began, time.monotonic()))
                time.sleep(1.0)
            for target in (LARGE, SMALL):
                began = time.monotonic()
                at.stop()
                at.start(target)
                clients.until_streaming()
                restarts.append((began, time.monotonic()))
                say(f"restart {number}: streams go on with {target} ranks after {time.monotonic() - began:.1f} s")
                time.sleep(1.0)
        records = clients.stop()
    tokens = sorted(at for record in records for at in record.token_times)
    ours, theirs = ([silence_ms(tokens, span) for span in spans] for spans in (scales, restarts))
    excused = [r for at, r in clients.failed if any(since <= at <= until for since, until in restarts)]
    for way, spans, found in (("scale", scales, ours), ("restart", restarts, theirs)):
        for (since, until), silent in zip(spans, found, strict=True):
            report.receipt("restart", way=way, took_ms=(until - since) * 1000, silent_ms=silent)
    load = f"{STREAMS} streams, {SMALL} <-> {LARGE}"
    report.add("longest time without any token, scale", load, "", ours)
    report.add("longest time without any token, restart", load, "", theirs, 0)
    ratio = percentile(theirs, 0.5) / max(percentile(ours, 0.5), 0.001)
    report.add("restart / scale", "medians", ">= 20 x", [ratio], 0, "x")
    report.note(f"restart: {len(excused)} requests failed by restarts; they are not held against the rest")
    report.ended("restart", compare([r for r in records if r not in excused], oracle))
