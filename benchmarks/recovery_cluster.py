"""A served cluster under streams for `recovery.py`: its history as it comes, what clients saw, and the verdict."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from chaos.target.cluster import ServedCluster
from chaos.workload.history import RequestRecord, Verdict, compare, percentile
from chaos.workload.streams import Load, Workload
from elastic.demo.model import write_demo_model
from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import ElasticError, WaitTimeout
from membership.base.events import Event, Tail
from membership.store.records import ClusterState

POLL_S = 0.01
LAST_WORDS = 4000  # characters of a log
PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 16, 224, 64  # a context is about 256 tokens long when its rank dies


class OurCluster(ServedCluster):
    """`elastic serve`, by way of recovery_roles or as it is."""

    def __init__(self, *arguments: Any, roles: str = "benchmarks.recovery_roles", **named: Any) -> None:
        super().__init__(*arguments, environ={"PYTHONPATH": import_path()}, **named)
        self._command[self._command.index("elastic.cli")] = roles

    def wait_serving(
        self, ranks: int, timeout_s: float = 120.0, notify: Callable[[str], None] = lambda _: None
    ) -> dict[str, Any]:
        """As there; if it does not come, what the server last said is printed first: its folder ends with the run."""
        try:
            return super().wait_serving(ranks, timeout_s, notify)
        except ElasticError:
            print(json.dumps({"what": "not ready", **last_words(self)}), flush=True)
            raise

    def read(self, key: str) -> bytes:
        """A record as it is stored."""
        self.client()
        found = self._store.get(key) if self._store is not None else None
        if found is None:
            raise ElasticError(f"{key} is not in the store")
        return found.value


def import_path(first: Path = Path(__file__).parents[1]) -> str:
    """PYTHONPATH for a child: this tree, then what we were given, or the child would import other versions."""
    return os.pathsep.join(filter(None, (str(first), os.environ.get("PYTHONPATH", ""))))


def last_words(cluster: ServedCluster) -> dict[str, Any]:
    """Its status, and the end of every log."""
    try:
        status: Any = cluster.status()
    except (ElasticError, OSError) as error:
        status = f"{type(error).__name__}: {error}"
    logs = {}
    for log in sorted(cluster.state.path.rglob("*.log")):
        end = log.read_text(encoding="utf-8", errors="replace")[-LAST_WORDS:]
        logs[str(log.relative_to(cluster.state.path))] = end.splitlines()
    return {"status": status, "logs": logs}


class History:
    """The cluster's events as they come; times of events become the monotonic clock's."""

    def __init__(self, path: Path) -> None:
        self.events: list[Event] = []
        self._tail = Tail(path)
        self._offset = time.time() - time.monotonic()

    def mark(self) -> int:
        """How many events there are now: where to look for later ones from."""
        while (more := self._tail.read()) is not None:
            self.events += more
        return len(self.events)

    def when(self, event: Event) -> float:
        """Its time on the monotonic clock."""
        return event.ts - self._offset

    def wait(self, since: int, what: str, wanted: Callable[[Event], bool], timeout_s: float = 60.0) -> Event:
        """The first event from `since` on that is `wanted`; WaitTimeout says `what` did not come."""
        deadline = time.monotonic() + timeout_s
        while True:
            end = self.mark()
            for at in range(since, end):
                if wanted(self.events[at]):
                    return self.events[at]
            since = end
            if time.monotonic() > deadline:
                raise WaitTimeout(f"not seen within {timeout_s:.0f} s: {what}")
            time.sleep(POLL_S)

    def wait_adopted(self, since: int, ranks: int, what: str, timeout_s: float = 90.0) -> Event:
        """The engine steps under a view of this number of ranks that was committed from `since` on: full strength."""
        committed = self.wait(
            since, f"a commit of {ranks} ranks {what}",
            lambda e: e.kind == "epoch_committed" and len(e.fields["ranks"]) == ranks, timeout_s,
        )  # fmt: skip
        return self.wait(
            since, f"epoch {committed.epoch} adopted {what}",
            lambda e: e.kind == "epoch_adopted" and e.epoch >= committed.epoch, timeout_s,
        )  # fmt: skip


class Scene:
    """A cluster at full strength with `streams` clients at it (0: idle), and a fault-free run to compare with."""

    def __init__(self, cluster: OurCluster, history: History, ranks: int, streams: int, seed: int) -> None:
        self.cluster, self.history, self.ranks, self.streams = cluster, history, ranks, streams
        self.random = random.Random(seed)
        self.records: list[RequestRecord] = []
        self.verdict = Verdict(0, ())
        self.steady: tuple[float, float] = (0.0, 0.0)  # when nothing was injected
        self._workload = self._new_workload(max(streams, 1))
        self._oracle: dict[int, RequestRecord] = {}

    def _new_workload(self, streams: int) -> Workload:
        tokenizer = Tokenizer(Path(self.state().config.model))  # type: ignore[union-attr]
        tokens = tokenizer.encode(" ".join(topics[name] for name in sorted(topics))[:200_000])
        cuts = [tokens[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(PROMPTS)]
        return Workload(
            self.cluster.url,
            self.cluster.model_name(),
            Load(streams=streams, max_tokens=MAX_TOKENS),
            prompts=cuts,  # type: ignore[arg-type]
        )

    def state(self) -> ClusterState:
        """The store's content now."""
        return self.cluster.client().state()

    def pid_of(self, rank: int) -> int:
        """The process of the rank that is in the view."""
        state = self.state()
        member = state.view.member(rank) if state.view else None
        if member is None:
            raise ElasticError(f"rank {rank} is not in the view")
        return state.ranks[rank, member.incarnation].pid

    def spare(self, timeout_s: float = 90.0) -> int:
        """The process of a spare, once one waits."""
        deadline = time.monotonic() + timeout_s
        while True:
            waiting = [pid for agent in self.state().agents.values() for pid in agent.spares]
            if waiting:
                return waiting[0]
            if time.monotonic() > deadline:
                raise WaitTimeout(f"no spare within {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def pause(self) -> None:
        """A random while, so that a fault hits any moment of a step."""
        time.sleep(self.random.uniform(0.25, 0.55))

    def begin(self, steady_s: float) -> None:
        """The oracle, then streams, then a while without a fault."""
        self._oracle = {r.prompt: r for r in self._new_workload(4).run_once()}
        if not self.streams:
            return
        self._workload.start()
        self.until_streaming()
        time.sleep(1.0)
        began = time.monotonic()
        time.sleep(steady_s)
        self.steady = (began, time.monotonic())

    def until_streaming(self, timeout_s: float = 60.0) -> None:
        """Wait until every stream is in the middle of a request."""
        deadline = time.monotonic() + timeout_s
        while sum(n > 0 for n in self._workload.open_streams().values()) < self.streams:
            if time.monotonic() > deadline:
                raise WaitTimeout(f"streams do not flow: {self._workload.open_streams()}")
            time.sleep(POLL_S)

    def end(self) -> None:
        """Let the streams end (idle: run every prompt once), and hold all against the oracle."""
        self.records = self._workload.stop() if self.streams else self._workload.run_once()
        self.verdict = compare(self.records, self._oracle)

    # -- what clients saw, once `end` was called -----------------------------------------------------------------------

    def gaps(self, since: float, until: float, wanted: Callable[[str], bool] = lambda _: True) -> list[float]:
        """Milliseconds of the gaps between tokens that overlap this time, of requests whose id is wanted."""
        return [
            (b - a) * 1000
            for record in self.records if wanted(record.id)
            for a, b in zip(record.token_times, record.token_times[1:], strict=False)
            if b > since and a < until
        ]  # fmt: skip

    def pace(self, since: float, until: float) -> float:
        """Tokens per second of all streams together; of a token whose gap lies partly within, that part."""
        return sum(
            (min(b, until) - max(a, since)) / (b - a)
            for record in self.records for a, b in pairwise(record.token_times) if b > max(a, since) and a < until
        ) / (until - since)  # fmt: skip

    def steady_p99_ms(self) -> float:
        """Of the gaps while nothing was injected."""
        return percentile(self.gaps(*self.steady), 0.99)

    def beyond(self, gaps: Sequence[float]) -> float | None:
        """The largest gap beyond the steady p99; None if there are none."""
        return max(0.0, max(gaps) - self.steady_p99_ms()) if gaps else None

    def control(self, window_s: float) -> list[float]:
        """`beyond` of windows of this length in which nothing was injected: what chance alone makes of it."""
        began, ended = self.steady
        count = int((ended - began) / window_s)
        found = [self.beyond(self.gaps(began + i * window_s, began + (i + 1) * window_s)) for i in range(count)]
        return [each for each in found if each is not None]


@contextmanager
def scene(
    ranks: int,
    streams: int,
    seed: int,
    *,
    steady_s: float = 15.0,
    flags: Sequence[str] = (),
    roles: str = "benchmarks.recovery_roles",
    **environment: Any,
) -> Iterator[Scene]:
    """Serve, begin, and at the end compare and stop. `environment` is for recovery_roles."""
    changes = {name: str(value) for name, value in environment.items()}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        with tempfile.TemporaryDirectory(prefix="elastic-ep-recovery-") as folder:
            write_demo_model(Path(folder) / "model")
            here, state_dir = Path(folder) / "model", Path(folder) / "state"
            flags = (*flags, "--no-prefix-cache")  # prompts are repeated: a replay is to compute its whole context
            with OurCluster(here, ranks, state_dir=state_dir, flags=flags, roles=roles) as cluster:
                cluster.wait_serving(ranks, timeout_s=180.0)
                made = Scene(cluster, History(cluster.state.events), ranks, streams, seed)
                made.begin(steady_s)
                yield made
                made.end()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
