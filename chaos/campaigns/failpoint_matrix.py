"""Every failpoint, and a role that dies, raises or hangs there: what was asked for ends, all serve, streams are exact.

All cells share one cluster. Each arms one fault for one time, causes what passes the point, sees in the history that it
struck, lets go of what hangs, and then waits for three things: the operation under way has ended by its deadline, the
cluster serves at its full size, and tokens come. Streams run all the time and are held against a fault-free run; only a
gateway's death may end the streams that it served, and even these have said nothing wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import psutil

from chaos.campaigns.failpoint_stimuli import SMALL, STIMULI, Scene, Stimulus, UnderWay
from chaos.faults.site import ServedSite
from chaos.target.cluster import ServedCluster
from chaos.target.waiting import eventually
from chaos.workload.history import RequestRecord, difference
from chaos.workload.streams import PROMPTS, Workload
from membership.base.errors import ElasticError, WaitTimeout
from membership.base.events import Event, Tail
from membership.base.failpoint_catalogue import POINTS
from membership.base.failpoints import KIND

FLAGS = ("--chaos", "--max-ranks", "4", "--spares", "1", "--restart-intensity", "1000", "--restart-window", "1s")
ACTIONS = ("kill", "raise", "hang")
STRUCK_S = 15.0  # a fault that has not struck by then was not dealt
PASSED_S = 2.0  # after the end of what was set off, somebody may still come by
TRIES = 4  # a controller that finds two things done goes through both edges in one transaction: nobody passes the first
HANG_S = 0.4
RANK_HANG_S = 1.2  # longer than the watchdog is patient
WHOLE_S = 60.0
STREAMS = 2
REST_S = 0.8  # of a stream between two requests: the load is there, and leaves room for what is started again

Tell = Callable[[str], None]
Cell = tuple[str, str]
"""(failpoint, action)"""


class _Passed(WaitTimeout):
    """What was set off has ended, and nobody came to the point."""


class CellResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one cell."""

    point: str
    action: str
    ok: bool
    ms: float
    said: str  # who was struck and how it ended; or what did not hold


def every_cell(points: Iterable[str] = POINTS, actions: Sequence[str] = ACTIONS) -> tuple[Cell, ...]:
    """The matrix."""
    return tuple((point, action) for point in points for action in actions)


def run_matrix(cluster: ServedCluster, cells: Iterable[Cell], tell: Tell = lambda _: None) -> tuple[CellResult, ...]:
    """Run these cells, in the order that takes the fewest changes, on a cluster served with FLAGS and SMALL ranks.

    A cell that leaves the cluster in a state which no other can start from is the last one.
    """
    left, results = list(cells), list[CellResult]()
    cluster.wait_serving(SMALL)
    oracle = {record.prompt: record for record in _streams(cluster).run_once()}
    workload = _streams(cluster)
    workload.start()
    try:
        matrix = _Matrix(cluster, workload, oracle)
        while left:
            cell = _next(left, matrix.scene.size)
            results.append(matrix.run(cell))
            last = results[-1]
            tell(f"{len(results)}/{len(results) + len(left)} {last.point} {last.action}: "
                 f"{'ok' if last.ok else 'FAILED'}, {last.ms:.0f} ms, {last.said}")  # fmt: skip
            if matrix.broken:
                break
    finally:
        workload.stop()
    for said in matrix.streams_broken():
        results[-1] = msgspec.structs.replace(results[-1], ok=False, said=f"{results[-1].said}; {said}")
    return tuple(results)


def _streams(cluster: ServedCluster) -> Workload:
    model = cluster.model_name()
    return Workload(cluster.url, model, prompts=PROMPTS[:8], concurrency=STREAMS, max_tokens=24, rest_s=REST_S)


def _next(left: list[Cell], size: int) -> Cell:
    """Take the first cell that can start from this size, else the first."""
    fitting = (cell for cell in left if STIMULI[cell[0]].needs in (0, size))
    cell = next(fitting, left[0])
    left.remove(cell)
    return cell


@dataclass
class _Matrix:
    """The cluster under fire, and what its clients saw."""

    cluster: ServedCluster
    workload: Workload
    oracle: dict[int, RequestRecord]
    broken: bool = False
    _judged: int = 0
    _outages: list[tuple[float, float]] = field(default_factory=list)  # of the gateway, on the monotonic clock

    def __post_init__(self) -> None:
        self.scene = Scene(self.cluster)
        self._site = ServedSite(self.cluster)
        self._tail = Tail(self.cluster.state.events)

    def run(self, cell: Cell) -> CellResult:
        """One cell."""
        point, action = cell
        stimulus = STIMULI[point]
        began, said = time.monotonic(), ""
        try:
            for left in reversed(range(TRIES)):
                stimulus.prepare(self.scene)
                began = time.monotonic()
                try:
                    said = self._strike(point, action, stimulus, began)
                    break
                except _Passed:
                    self._site.arm("")
                    if not left:
                        raise
            wrong = self.streams_broken()
        except ElasticError as error:
            wrong = [f"{said}{error}"]
            self.broken = not self._recovered()
        finally:
            self._site.arm("")
        ms = round((time.monotonic() - began) * 1000, 1)
        return CellResult(point=point, action=action, ok=not wrong, ms=ms, said="; ".join(wrong) or said)

    def _strike(self, point: str, action: str, stimulus: Stimulus, began: float) -> str:
        while self._tail.read() is not None:
            continue
        ranks = self.scene.rank_pids()
        extra = "".join(f";{each}" for each in stimulus.also)
        self._site.arm(f"{point}=1*{action}{extra}")
        with stimulus.under_way(self.scene) as under_way:
            struck = self._struck(point, stimulus, under_way)
            if action.startswith("hang"):
                time.sleep(RANK_HANG_S if struck.role == "rank" else HANG_S)
                self._site.arm("")
            dead = self._dead(struck, action, ranks)
            told = under_way.ended()
        self._whole(dead)
        if struck.role == "gateway":
            self._outages.append((began, time.monotonic()))
        who = f"rank {struck.rank}" if struck.role == "rank" else struck.role
        return f"struck {who}{told}"

    def _struck(self, point: str, stimulus: Stimulus, under_way: UnderWay) -> Event:
        """The event that says that somebody was struck at the point; WaitTimeout if nobody passes it."""
        what, until = f"somebody to pass {point} ({stimulus.words})", time.monotonic() + STRUCK_S
        while time.monotonic() < until:
            over = under_way.over
            with suppress(WaitTimeout):
                return eventually(lambda: self._seen(point), what, PASSED_S)
            if over:
                raise _Passed(f"in vain: {what}")
        raise WaitTimeout(f"not within {STRUCK_S:g} s: {what}")

    def _seen(self, point: str) -> Event | None:
        more = self._tail.read() or ()
        return next((e for e in more if e.kind == KIND and e.fields["name"] == point), None)

    def _dead(self, struck: Event, action: str, ranks: set[int]) -> set[int]:
        """The processes that have ended by the blow: the one that was struck and, if that was an agent, its ranks.

        An exception ends a role that drives others; ranks answer with it, and a gateway may.
        """
        pid = int(struck.fields["pid"])
        if action.startswith("hang") or (action == "raise" and struck.role in ("rank", "gateway")):
            return set()
        eventually(lambda: not psutil.pid_exists(pid), f"the end of {struck.role}, process {pid}", STRUCK_S)
        return {pid, *ranks} if struck.role == "agent" else {pid}

    def _whole(self, dead: set[int]) -> None:
        """Until all serve, without those who are dead, and tokens come."""
        self.scene.wait_whole(dead, WHOLE_S)
        done, streams = self._done(), self.workload.open_streams()

        def more() -> bool:
            now = self.workload.open_streams()
            return self._done() > done or any(now.get(each, 0) > tokens for each, tokens in streams.items())

        eventually(more, "a token of any stream", WHOLE_S)

    def _done(self) -> int:
        return sum(record.complete for record in self.workload.records())

    def _recovered(self) -> bool:
        self._site.arm("")
        try:
            self._whole(set())
        except WaitTimeout:
            return False
        return True

    def streams_broken(self) -> list[str]:
        """The streams that have ended since the last time and are not as without a fault."""
        records = self.workload.records()
        fresh, self._judged = records[self._judged :], len(records)
        return [said for record in fresh if (said := self._wrong(record))]

    def _wrong(self, record: RequestRecord) -> str:
        expected = self.oracle[record.prompt]
        found = difference(record, expected)
        if found is None:
            return ""
        cut = any(record.started <= end for _, end in self._outages)
        if cut and not record.complete and record.tokens == expected.tokens[: len(record.tokens)]:
            return ""  # its gateway was struck meanwhile: what it has said is right
        return f"request {found.prompt} {found.kind}: {found.explanation}"
