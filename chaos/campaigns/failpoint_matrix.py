"""Every failpoint, and a role that dies, raises or hangs there.

All cells share one cluster. Each arms one fault for one time, causes what passes the point, sees in the history that it
was injected, releases what hangs, and then waits for three things: the operation under way has ended by its
deadline, the cluster serves at its full size, and tokens come. Only a gateway's death may end the streams that it
served, and even these have delivered nothing wrong.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import psutil

from chaos.campaigns.failpoint_stimuli import SMALL, STIMULI, Scene, Stimulus, UnderWay
from chaos.campaigns.matrix import Matrix
from chaos.target.waiting import until
from chaos.workload.history import RequestRecord
from chaos.workload.streams import Load
from membership.base.errors import ElasticError, WaitTimeout
from membership.base.events import Event
from membership.base.failpoint_catalogue import ON_ONE_HOST
from membership.base.failpoints import KIND

FLAGS = ("--chaos", "--max-ranks", "4", "--spares", "1", "--restart-intensity", "1000", "--restart-window", "1s")
ACTIONS = ("kill", "raise", "hang")
INJECTED_S = 15.0  # a fault that has not happened by then was not injected
PASSED_S = 2.0  # after the end of the stimulus, a process may still come by
TRIES = 4  # a controller that finds two things done takes both edges in one transaction: it does not pass the first
HANG_S = 0.4
RANK_HANG_S = 1.2  # longer than the watchdog is patient
WHOLE_S = 60.0
LOAD = Load(streams=2, max_tokens=24, rest_s=0.8)  # the load is there, and leaves room for what is started again

Cell = tuple[str, str]
"""(failpoint, action)"""


class _NotPassed(WaitTimeout):
    """The stimulus has ended, and no process came to the point."""


class CellResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one cell."""

    point: str
    action: str
    ok: bool
    ms: float
    said: str  # the victim and how it ended; or what did not hold


def every_cell(points: Iterable[str] = ON_ONE_HOST, actions: Sequence[str] = ACTIONS) -> list[Cell]:
    """The matrix."""
    return [(point, action) for point in points for action in actions]


@dataclass(kw_only=True)
class FailpointMatrix(Matrix[Cell, CellResult]):
    """On a cluster served with FLAGS and SMALL ranks, in the order that takes the fewest changes of size."""

    ranks: int = SMALL
    load: Load = LOAD
    _outages: list[tuple[float, float]] = field(default_factory=list)  # of the gateway, on the monotonic clock

    def before(self) -> None:
        """The cluster as stimuli see it."""
        self.scene = Scene(self.cluster)

    def after(self) -> None:
        """The streams that ended last."""
        if wrong := self._streams_wrong():
            last = self.results[-1]
            self.results[-1] = msgspec.structs.replace(last, ok=False, said="; ".join([last.said, *wrong]))

    def words(self, result: CellResult) -> str:
        """A result for people."""
        return f"{result.point} {result.action}: {'ok' if result.ok else 'FAILED'}, {result.ms:.0f} ms, {result.said}"

    def next(self) -> Cell:
        """Take the first cell that can start from the size that the cluster has, else the first."""
        size = self.scene.size
        fitting = (cell for cell in self.left if STIMULI[cell[0]].needs in (0, size))
        cell = next(fitting, self.left[0])
        self.left.remove(cell)
        return cell

    def cell(self, cell: Cell) -> CellResult:
        """One cell."""
        point, action = cell
        stimulus = STIMULI[point]
        began, said = time.monotonic(), ""
        try:
            for left in reversed(range(TRIES)):
                stimulus.prepare(self.scene)
                began = time.monotonic()
                try:
                    said = self._inject(point, action, stimulus)
                    break
                except _NotPassed:
                    self.target.site.arm("")
                    if not left:
                        raise
            wrong = self._streams_wrong()
        except ElasticError as error:
            wrong = [str(error)]
            self.over = not self._recovered()
        finally:
            self.target.site.arm("")
        ms = round((time.monotonic() - began) * 1000, 1)
        return CellResult(point=point, action=action, ok=not wrong, ms=ms, said="; ".join(wrong) or said)

    def _inject(self, point: str, action: str, stimulus: Stimulus) -> str:
        """Arm, stimulate, see, release, wait until whole; the victim and how the stimulus ended, in words."""
        began, ranks, site = time.monotonic(), self.scene.rank_pids(), self.target.site
        self.target.events()  # what was before
        stimulus.arm(self.scene, f"{point}=1*{action}")
        with stimulus.under_way(self.scene) as under_way:
            injected = self._injected(point, stimulus, under_way)
            if action == "hang":
                time.sleep(RANK_HANG_S if injected.role == "rank" else HANG_S)
                site.arm("")
            dead = _dead(injected, action, ranks)
            ended = under_way.ended()
        self._wait_served(dead)
        if injected.role == "gateway":
            self._outages.append((began, time.monotonic()))
        victim = f"rank {injected.rank}" if injected.role == "rank" else injected.role
        return f"injected into {victim}{ended}"

    def _injected(self, point: str, stimulus: Stimulus, under_way: UnderWay) -> Event:
        """The event of the fault at the point; WaitTimeout if no process passes it."""
        what, end = f"a process to pass {point} ({stimulus.words})", time.monotonic() + INJECTED_S
        while time.monotonic() < end:
            over = under_way.over
            with suppress(WaitTimeout):
                return until(lambda: self._seen(point), what, PASSED_S)
            if over:
                raise _NotPassed(f"in vain: {what}")
        raise WaitTimeout(f"not within {INJECTED_S:g} s: {what}")

    def _seen(self, point: str) -> Event | None:
        return next((e for e in self.target.events() if e.kind == KIND and e.fields["name"] == point), None)

    def _wait_served(self, dead: set[int]) -> None:
        """Until all ranks serve, no process of `dead` is recorded, and tokens come."""
        self.scene.wait_whole(dead, WHOLE_S)
        if (workload := self.workload) is None:
            return
        done, streams = _complete(workload.records()), workload.open_streams()

        def more() -> bool:
            now = workload.open_streams()
            return _complete(workload.records()) > done or any(now.get(s, 0) > tokens for s, tokens in streams.items())

        until(more, "a token of any stream", WHOLE_S)

    def _recovered(self) -> bool:
        self.target.site.arm("")
        try:
            self._wait_served(set())
        except WaitTimeout:
            return False
        return True

    def _streams_wrong(self) -> list[str]:
        """What is wrong with the streams that have ended since the last call."""
        _, wrong, _ = self.new_requests(lambda record: any(record.started <= end for _, end in self._outages))
        return wrong


def _dead(injected: Event, action: str, ranks: set[int]) -> set[int]:
    """The processes that have ended by the fault: the victim's and, if that was an agent, its ranks'.

    An exception ends a role that drives others; ranks answer with it, and a gateway may.
    """
    pid = int(injected.fields["pid"])
    if action == "hang" or (action == "raise" and injected.role in ("rank", "gateway")):
        return set()
    until(lambda: not psutil.pid_exists(pid), f"the end of {injected.role}, process {pid}", INJECTED_S)
    return {pid, *ranks} if injected.role == "agent" else {pid}


def _complete(records: Sequence[RequestRecord]) -> int:
    return sum(record.complete for record in records)
