"""What is done to a cluster hundreds of times under load, and whether anything was lost, altered or is left of it.

Streams run all the while and are held against a fault-free run; the processes that live on are watched for what they
hold. The soak (`soak.py`) and the churn (`churn.py`) say what is done.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from chaos.check.checker import judge
from chaos.record.recorder import Recorder
from chaos.target.cluster import ServedCluster
from chaos.target.footprint import Footprint, Growth, growth, look, processes
from chaos.workload.history import RequestRecord, Verdict, compare
from chaos.workload.streams import Workload
from membership.base.errors import ElasticError

Tell = Callable[[str], None]
LOOK_EVERY = 20  # times that it was done
WARM_UP = 0.2  # of the run: caches and allocators fill up
SLOPE_MB = 1.0  # per 100 times
SLOPE_TIMES = 100  # of fewer a slope says nothing
SLACK = 8  # open files and threads that may come and go
POLL_S = 0.01
OURS = ("supervisor", "controller", "agent", "engine", "gateway", "forkserver")  # etcd's memory is its own affair


@dataclass(kw_only=True)
class Endurance:
    """What has been gathered so far. Everything random comes from the seed (the cluster's own timing does not)."""

    seed: int
    looks: list[tuple[int, dict[str, Footprint]]] = field(default_factory=list)
    oracle: dict[int, RequestRecord] = field(default_factory=dict)
    history: list[RequestRecord] = field(default_factory=list)
    processes: tuple[int, int] = (0, 0)
    shm: tuple[int, int] = (0, 0)
    epochs: int = 0
    seconds: float = 0.0
    stuck: str = ""  # what was waited for in vain
    replay: str = ""  # the command that runs it again
    recorder: Recorder | None = None  # of all that happens under load

    @contextmanager
    def under_load(
        self, cluster: ServedCluster, ranks: int, streams: int, tell: Tell, lengths: Sequence[int] = ()
    ) -> Iterator[Workload]:
        """Take the oracle, then stream for the length of the block; afterwards all `ranks` must serve again."""
        cluster.wait_serving(ranks, tell=tell)
        tell("fault-free run of every request (the oracle)")
        workload = Workload(cluster.url, cluster.model_name(), lengths=lengths, concurrency=streams, seed=self.seed)
        self.oracle = {record.prompt: record for record in workload.run_once()}
        before, shm, epoch = processes(cluster.pid), _shm(), cluster.status()["epoch"]
        workload = Workload(cluster.url, cluster.model_name(), lengths=lengths, concurrency=streams, seed=self.seed)
        what = type(self).__name__.lower()
        with Recorder.of(cluster, what=what, seed=self.seed, replay=self.replay) as self.recorder:
            started = time.monotonic()
            workload.start()
            try:
                yield workload
                cluster.wait_serving(ranks)
            except ElasticError as error:  # whatever was waited for in vain: it is judged, and the record is kept
                self.stuck = str(error)
                tell(self.stuck)
            finally:
                self.history = workload.stop()
                self.seconds = time.monotonic() - started
        self.recorder.expected(self.oracle.values())
        self.recorder.answered(self.history)
        if self.stuck:
            return
        self.epochs = cluster.status()["epoch"] - epoch
        self.processes = (before, _settled(lambda: processes(cluster.pid), before))
        self.shm = (shm, _settled(_shm, shm))

    def look(self, cluster: ServedCluster, done: int, wanted: int) -> None:
        """See what the processes hold, now and then."""
        since = self.looks[-1][0] if self.looks else 0
        if done >= WARM_UP * wanted and done - since >= min(LOOK_EVERY, wanted / 10):
            engine = cluster.client().state().engine
            office = f"engine {engine.pid if engine is not None else 0}"  # who takes it holds more than while it waited
            self.looks.append(
                (done, {name + " in office" * (name == office): held for name, held in look(cluster.pid).items()})
            )

    def verdict(self) -> Verdict:
        """The history beside the oracle."""
        return compare(self.history, self.oracle)

    def growth(self) -> tuple[Growth, ...]:
        """What grew."""
        return growth(self.looks)

    def verify(self, times: int, what: str) -> None:
        """Say in the record what only the run itself can know: whether anything leaks."""
        if self.recorder is not None:
            leaks = self._leaks(times, what)
            grown = max((each.rss_mb_per_100 for each in self.growth() if each.process.startswith(OURS)), default=0.0)
            said = (
                f"{self.processes[0]} processes before, {self.processes[1]} after; memory grows by at most {grown:g} MB"
            )
            self.recorder.verified("G7", not leaks, "; ".join(leaks) or f"{said} per 100 {what}")

    def broken(self, times: int, what: str) -> list[str]:
        """What did not hold, a line each; `times` that it was to be done, `what` it is called."""
        verdict = self.verdict()
        broken = [f"request {d.prompt} {d.kind}: {d.explanation}" for d in verdict.differences[:10]]
        failed = [record for record in self.oracle.values() if not record.complete]
        broken += [f"the fault-free run of prompt {record.prompt} failed: {record.error}" for record in failed]
        if self.stuck:
            broken.append(self.stuck)
        if not verdict.requests:
            broken.append("no request was compared")
        return broken + self._found() + self._leaks(times, what)

    def _leaks(self, times: int, what: str) -> list[str]:
        """What is left, or grows."""
        leaks = []
        if self.processes[1] > self.processes[0]:
            leaks.append(f"{self.processes[0]} processes before, {self.processes[1]} after")
        if self.shm[1] > self.shm[0]:
            leaks.append(f"{self.shm[0]} files in /dev/shm before, {self.shm[1]} after")
        return leaks + _outgrown(self.growth(), times, what)

    def _found(self) -> list[str]:
        """What the checks of the record found, beyond the requests, which are judged above."""
        if self.recorder is None:
            return []
        outcomes = judge(self.recorder.lines()).outcomes
        found = [f for outcome in outcomes if outcome.title not in ("requests", "by the run") for f in outcome.findings]
        return [f"{each.promise}: {each.what}" for each in found]


def _outgrown(grown: Sequence[Growth], times: int, what: str) -> list[str]:
    broken = []
    for each in grown:
        if not each.process.startswith(OURS):
            continue
        if times >= SLOPE_TIMES and each.rss_mb_per_100 > SLOPE_MB:
            broken.append(f"memory of {each.process} grows by {each.rss_mb_per_100} MB per 100 {what}")
        for kind, (first, last) in (("open files", each.files), ("threads", each.threads)):
            if last > first + SLACK:
                broken.append(f"{kind} of {each.process}: {first} at first, {last} at last")
    return broken


def _settled(number: Callable[[], int], expected: int, timeout_s: float = 10.0) -> int:
    """The number, once what is ending has ended."""
    deadline = time.monotonic() + timeout_s
    while (found := number()) > expected and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found


def _shm() -> int:
    return len(os.listdir("/dev/shm"))  # noqa: S108 - only looked at


def seed_of(given: int | None) -> int:
    """The seed that was asked for, or a fresh one."""
    return random.SystemRandom().randrange(100_000) if given is None else given
