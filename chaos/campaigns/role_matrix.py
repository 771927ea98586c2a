"""The matrix of roles and process faults: each fault is injected into each role, and the cluster is whole afterwards.

A gateway takes the streams it serves with it (docs/GUARANTEES.md): those are counted apart, and what they had brought
must be right. A supervisor's death ends everything; then nothing may be left, and the next cell gets another cluster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import psutil

from chaos.campaigns.matrix import Matrix
from chaos.campaigns.targets import unready
from chaos.faults.base import Injected, NotInjected
from chaos.faults.catalogue import injector
from chaos.target.waiting import until
from chaos.workload.streams import Load
from membership.base.errors import ElasticError, StoreError, WaitTimeout

ROLES = ("gateway", "engine", "engine-standby", "controller", "agent", "rank", "etcd", "supervisor")
EVERYWHERE = ("kill", "segv", "stop", "slow", "fd-exhaustion", "oom")
BESIDES = {  # faults that only some victims can have
    "rank": ("step-raise", "step-hang", "step-hang-gil", "step-delay", "launch-hang", "crash-device",
             "device-oom", "torn-write", "dead-reader", "bit-flip-answer", "bit-flip-liveness"),
    "agent": ("host-death",),
    "forkserver": ("parent-death",),
    "gateway": ("oversize",),
}  # fmt: skip
DEADLY = ("kill", "segv", "oom", "crash-device", "device-oom", "torn-write", "host-death", "parent-death")
# held until the product gives the rank up
GIVEN_UP = ("stop", "dead-reader", "step-hang", "step-hang-gil", "launch-hang")
# Slots die often, on purpose; and with the only agent all ranks go, whose return takes long on a busy machine.
FLAGS = ("--chaos", "--restart-intensity", "1000", "--restart-window", "1s", "--max-ranks", "4",
         "--coverage-deadline", "100s")  # fmt: skip
LOAD = Load(streams=3, max_tokens=32, rest_s=0.5)  # the load is there, and leaves room for what is started again
HELD_S = 1.0  # how long a fault lasts that ends only by healing
WHOLE_S = 90.0  # by when everything must be as before


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
    """What came of one cell. `broken`: streams that ended with their gateway."""

    cell: str
    ok: bool
    injected: Injected | None
    seconds: float
    requests: int = 0
    broken: int = 0
    said: str = ""


class MatrixReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the matrix proved."""

    ok: bool
    cells: int  # that were to be run
    passed: int
    requests: int
    broken: int  # streams that ended with their gateway
    seconds: float
    results: tuple[CellResult, ...]

    @classmethod
    def of(cls, cells: int, results: Sequence[CellResult]) -> MatrixReceipt:
        """Add up the results of a matrix with this number of cells. Pure."""
        passed = sum(result.ok for result in results)
        return cls(
            ok=passed == cells,
            cells=cells,
            passed=passed,
            requests=sum(result.requests for result in results),
            broken=sum(result.broken for result in results),
            seconds=round(sum(result.seconds for result in results), 1),
            results=tuple(results),
        )


def all_cells() -> list[Cell]:
    """Every cell, those that end the cluster last."""
    cells = [Cell(role, fault) for role in ROLES for fault in EVERYWHERE]
    cells += [Cell(role, fault) for role, faults in BESIDES.items() for fault in faults]
    return sorted(cells, key=lambda cell: cell.fatal)


@dataclass(kw_only=True)
class RoleMatrix(Matrix[Cell, CellResult]):
    """On a cluster served with FLAGS."""

    ranks: int = 3
    load: Load = LOAD

    def words(self, result: CellResult) -> str:
        """A result for people."""
        proof = result.injected.proof if result.injected else "not injected"
        verdict = f"{result.cell}: {'ok' if result.ok else 'FAILED'} in {result.seconds:.1f} s"
        return "; ".join(filter(None, (verdict, proof, result.said)))

    def cell(self, cell: Cell) -> CellResult:
        """One cell."""
        began, injected, said = time.monotonic(), None, ""
        victim = self._rank() if cell.role == "rank" else cell.role
        until(self._streaming, "streams under way")
        family = psutil.Process(self.cluster.pid).children(recursive=True) if cell.fatal else []
        try:
            fault = injector(cell.fault, self.target.site, victim)
            try:
                injected = fault.inject()
                self._wait_effect(cell, victim, injected)
            finally:
                fault.heal()
            if cell.fatal:
                _require_gone(family)
            else:
                until(lambda: self._is_whole(victim), f"whole again after {cell.fault} of {victim}", WHOLE_S)
                self._stream_again()
        except ElasticError as error:
            said = f"{type(error).__name__}: {error}"
        requests, wrong, broken = self.new_requests(lambda record: cell.role in ("gateway", "supervisor"))
        ok = not said and not wrong
        self.over = cell.fatal or not (ok or self._recovers())
        return CellResult(
            cell=cell.name, ok=ok, injected=injected, requests=requests, broken=broken,
            seconds=round(time.monotonic() - began, 2), said="; ".join([*([said] if said else []), *wrong[:3]]),
        )  # fmt: skip

    def _rank(self) -> str:
        """The next one of the view's."""
        ranks = until(lambda: self.cluster.client().view().ranks, "a view with ranks")
        return f"rank {ranks[len(self.results) % len(ranks)]}"

    def _wait_effect(self, cell: Cell, victim: str, injected: Injected) -> None:
        """Wait for what must come of the fault before it is healed."""
        if cell.fatal:
            return
        if cell.fault in DEADLY or (cell.role == "rank" and cell.fault in GIVEN_UP):
            until(
                lambda: self._pid(victim) not in (0, injected.pid), f"a successor of {victim}, process {injected.pid}"
            )
        else:
            time.sleep(HELD_S)

    def _pid(self, victim: str) -> int:
        """Its process; 0 if there is none now."""
        try:
            return self.target.site.pid(victim)
        except NotInjected:
            return 0

    def _is_whole(self, victim: str) -> bool:
        """Whether every process is there, all ranks serve, and the gateway says so."""
        try:
            self.cluster.wait_serving(self.ranks, timeout_s=WHOLE_S)
            return bool(self._pid(victim)) and not unready(self.cluster.url)
        except StoreError:
            return False

    def _recovers(self) -> bool:
        """Whether there is any use in going on with this cluster after a cell that failed."""
        try:
            self.cluster.wait_serving(self.ranks, timeout_s=HELD_S)
        except ElasticError:
            return False
        return True

    def _streaming(self) -> bool:
        return self.workload is not None and sum(n > 1 for n in self.workload.open_streams().values()) >= 2

    def _stream_again(self) -> None:
        """Until everything that streams now has ended, and as much that began later, well."""
        if (workload := self.workload) is None:
            return
        now = time.monotonic()
        until(
            lambda: sum(record.complete and record.started > now for record in workload.records()) >= self.load.streams,
            f"{self.load.streams} requests to begin and end",
        )


def _require_gone(family: Sequence[psutil.Process]) -> None:
    """WaitTimeout if anything is left behind by a supervisor that died."""
    _, alive = psutil.wait_procs(list(family), timeout=WHOLE_S / 2)
    if alive:
        raise WaitTimeout(f"{len(alive)} processes outlived their supervisor: {[p.pid for p in alive]}")
