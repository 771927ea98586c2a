"""The matrix of roles and process faults: each fault befalls each role under load, and the cluster is whole afterwards.

One cluster serves all cells, streams run all the while, and what ended during a cell is held against a fault-free run.
A gateway takes the streams it serves with it (docs/GUARANTEES.md): those are counted apart, and what they had brought
must be right. A supervisor's death ends everything; then nothing may be left, and the next cell gets another cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import httpx
import msgspec
import psutil

from chaos.faults.base import Injected, Injector, NotInjected
from chaos.faults.catalogue import injector
from chaos.faults.site import ServedSite
from chaos.target.cluster import ServedCluster
from chaos.target.waiting import eventually
from chaos.workload.history import RequestRecord, difference
from chaos.workload.streams import PROMPTS, Workload
from membership.base.errors import ElasticError, StoreError, WaitTimeout

Tell = Callable[[str], None]

ROLES = ("gateway", "engine", "engine-standby", "controller", "agent", "rank", "etcd", "supervisor")
EVERYWHERE = ("kill", "segv", "stop", "slow", "fd-exhaustion", "oom")
BESIDES = {  # what only some can suffer
    "rank": ("step-raise", "step-hang", "step-hang-gil", "step-delay",
             "torn-write", "dead-reader", "bit-flip-answer", "bit-flip-liveness"),
    "agent": ("host-death",),
    "forkserver": ("parent-death",),
    "gateway": ("oversize",),
}  # fmt: skip
DEADLY = ("kill", "segv", "oom", "torn-write", "host-death", "parent-death")
GIVEN_UP = ("stop", "dead-reader", "step-hang", "step-hang-gil")  # held until the product gives the rank up
# Slots die often, on purpose; and with the only agent all ranks go, whose return may take long where others work too.
FLAGS = ("--chaos", "--restart-intensity", "1000", "--restart-window", "1s", "--max-ranks", "4",
         "--coverage-deadline", "100s")  # fmt: skip
STREAMS, TOKENS = 3, 32
REST_S = 0.5  # of a stream between two requests: the load is there, and leaves room for what is started again
HELD_S = 1.0  # how long a fault lasts that ends only by healing
WHOLE_S = 90.0  # by when everything must be as before
POLL_S = 0.02


class Cell(msgspec.Struct, frozen=True):
    """One fault for one role."""

    role: str
    fault: str

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        return f"{self.role}/{self.fault}"

    @property
    def fatal(self) -> bool:
        """Whether the cluster ends with it."""
        return self.role == "supervisor" and self.fault in DEADLY


class CellResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. `broken`: streams that ended with their gateway."""

    cell: str
    ok: bool
    injected: Injected | None
    seconds: float
    requests: int = 0
    broken: int = 0
    said: str = ""


def all_cells() -> list[Cell]:
    """Every cell, those that end the cluster last."""
    cells = [Cell(role, fault) for role in ROLES for fault in EVERYWHERE]
    cells += [Cell(role, fault) for role, faults in BESIDES.items() for fault in faults]
    return sorted(cells, key=lambda cell: cell.fatal)


def misfits(records: Sequence[RequestRecord], oracle: dict[int, RequestRecord], gateway: bool) -> tuple[list[str], int]:
    """What is wrong with these requests, and how many merely broke off. Pure.

    `gateway`: whether it was the gateway that had a fault; then a stream may break off, but what it brought is right.
    """
    wrong, broken = [], 0
    for record in records:
        expected = oracle[record.prompt]
        if gateway and not record.complete and record.tokens == expected.tokens[: len(record.tokens)]:
            broken += 1
        elif (found := difference(record, expected)) is not None:
            wrong.append(f"request {found.prompt} {found.kind}: {found.explanation}")
    return wrong, broken


def run_role_matrix(cluster: ServedCluster, cells: Sequence[Cell], tell: Tell, ranks: int = 3) -> list[CellResult]:
    """Each cell in turn; stops where the cluster does not recover. A cell that ends the cluster must be the last."""
    cluster.wait_serving(ranks, tell=tell)
    results: list[CellResult] = []
    with _Streams(cluster) as streams:
        for number, cell in enumerate(cells):
            result = _Run(cluster, cell, f"rank {number % ranks}" if cell.role == "rank" else cell.role, ranks).run(
                streams
            )
            results.append(result)
            tell(f"{cell.name}: {'ok' if result.ok else 'FAILED'} in {result.seconds:.1f} s; "
                 f"{result.injected.proof if result.injected else 'not injected'}"
                 f"{'; ' * bool(result.said)}{result.said}")  # fmt: skip
            if cell.fatal or not (result.ok or _recovers(cluster, ranks)):
                break
    return results


def _recovers(cluster: ServedCluster, ranks: int) -> bool:
    """Whether there is any use in going on with this cluster after a cell that failed."""
    try:
        cluster.wait_serving(ranks, timeout_s=HELD_S)
    except ElasticError:
        return False
    return True


class _Streams:
    """Streams, their fault-free answers, and what of them has been judged."""

    def __init__(self, cluster: ServedCluster) -> None:
        self.cluster = cluster
        self._judged = 0
        self.over = False  # the cluster has ended, on purpose

    def __enter__(self) -> _Streams:
        self.oracle = {record.prompt: record for record in self._workload().run_once()}
        self.workload = self._workload()
        self.workload.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.workload.stop()

    def _workload(self) -> Workload:
        model = self.cluster.model_name()
        return Workload(
            self.cluster.url, model, prompts=PROMPTS[:8], concurrency=STREAMS, max_tokens=TOKENS, rest_s=REST_S
        )

    def round(self) -> None:
        """Until everything that streams now has ended, and as much that began later, well."""
        begun = time.monotonic()
        eventually(
            lambda: sum(r.complete and r.started > begun for r in self.workload.records()) >= STREAMS,
            f"{STREAMS} requests to begin and end",
        )

    def judge(self, gateway: bool) -> tuple[int, list[str], int]:
        """What has ended since the last time: how many, what is wrong, how many broke off."""
        records = self.workload.records()
        new, self._judged = records[self._judged :], len(records)
        return (len(new), *misfits(new, self.oracle, gateway))


class _Run:
    """One cell."""

    def __init__(self, cluster: ServedCluster, cell: Cell, victim: str, ranks: int) -> None:
        self.cluster, self.cell, self.victim, self.ranks = cluster, cell, victim, ranks
        self.site = ServedSite(cluster)

    def run(self, streams: _Streams) -> CellResult:
        began, injected, said = time.monotonic(), None, ""
        eventually(lambda: sum(n > 1 for n in streams.workload.open_streams().values()) >= 2, "streams under way")
        family = psutil.Process(self.cluster.pid).children(recursive=True) if self.cell.fatal else []
        try:
            with self._healed() as fault:
                injected = fault.inject()
                self._follow(injected)
            if self.cell.fatal:
                _require_gone(family)
            else:
                self._whole(injected)
                streams.round()
        except ElasticError as error:
            said = f"{type(error).__name__}: {error}"
        requests, wrong, broken = streams.judge(self.cell.role in ("gateway", "supervisor"))
        return CellResult(
            cell=self.cell.name, ok=not said and not wrong, injected=injected, requests=requests, broken=broken,
            seconds=round(time.monotonic() - began, 2), said="; ".join([*([said] if said else []), *wrong[:3]]),
        )  # fmt: skip

    @contextmanager
    def _healed(self) -> Iterator[Injector]:
        fault = injector(self.cell.fault, self.site, self.victim)
        try:
            yield fault
        finally:
            fault.heal()

    def _follow(self, injected: Injected) -> None:
        """What must come of it before it is healed."""
        if self.cell.fatal:
            return
        if self.cell.fault in DEADLY or (self.cell.role == "rank" and self.cell.fault in GIVEN_UP):
            self._replaced(injected.pid)
        else:
            time.sleep(HELD_S)

    def _replaced(self, pid: int) -> None:
        def there() -> bool:
            try:
                return self.site.pid(self.victim) != pid
            except NotInjected:
                return False

        eventually(there, f"another process of {self.victim} than {pid}")

    def _whole(self, injected: Injected) -> None:
        """Everybody is there, all ranks serve, and the gateway says so."""
        deadline = time.monotonic() + WHOLE_S
        while True:
            try:
                self.cluster.wait_serving(self.ranks, timeout_s=max(1.0, deadline - time.monotonic()))
                self.site.pid(self.victim)
                if httpx.get(f"{self.cluster.url}/readyz", timeout=5.0).status_code == httpx.codes.OK:
                    return
            except (NotInjected, StoreError, httpx.HTTPError):
                pass
            if time.monotonic() > deadline:
                raise WaitTimeout(f"not whole within {WHOLE_S:g} s of {injected.fault} of {self.victim}")
            time.sleep(POLL_S)


def _require_gone(family: Sequence[psutil.Process]) -> None:
    """Nothing is left behind by a supervisor that died."""
    _, alive = psutil.wait_procs(list(family), timeout=WHOLE_S / 2)
    if alive:
        raise WaitTimeout(f"{len(alive)} processes outlived their supervisor: {[p.pid for p in alive]}")
