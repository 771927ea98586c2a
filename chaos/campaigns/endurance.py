"""A recorded campaign that acts hundreds of times is also watched for leaks.

The processes that live on are watched for what they hold. The soak (`soak.py`) and the churn (`churn.py`) say what is
done.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from chaos.campaigns.campaign import LongReceipt
from chaos.campaigns.recorded import Recorded
from chaos.target.footprint import Footprint, Growth, growth, look, processes
from chaos.target.waiting import until
from membership.base.errors import WaitTimeout

LOOK_EVERY = 20  # actions
WARM_UP = 0.2  # of the run: caches and allocators fill up
SLOPE_MB = 1.0  # per 100 actions
SLOPE_ACTIONS = 200  # of fewer a slope says nothing: in its first 100 a gateway still warms up
SLACK = 8  # open files and threads that may come and go
SETTLE_S = 10.0
OURS = ("supervisor", "controller", "agent", "engine", "gateway", "forkserver")  # etcd's memory is its own affair


class EnduranceReceipt(LongReceipt, frozen=True, kw_only=True):
    """What a long campaign proved; counts before and after it."""

    processes: tuple[int, int]
    growth: tuple[Growth, ...]


@dataclass(kw_only=True)
class Endurance(Recorded):
    """What a long campaign gathers."""

    unit = "actions"  # what it does, in words

    looks: list[tuple[int, dict[str, Footprint]]] = field(default_factory=list)
    processes: tuple[int, int] = (0, 0)
    shm: tuple[int, int] = (0, 0)

    @property
    @abstractmethod
    def done(self) -> int:
        """The number of actions so far."""

    def before(self) -> None:
        """Count what there is."""
        super().before()
        self.processes, self.shm = (processes(self.cluster.pid), 0), (_shm(), 0)

    def after(self) -> None:
        """Count again; note in the record whether anything leaks."""
        super().after()
        if not self.troubles:
            (processes_before, _), (shm_before, _) = self.processes, self.shm
            self.processes = (processes_before, _settled(lambda: processes(self.cluster.pid), processes_before))
            self.shm = (shm_before, _settled(_shm, shm_before))
        leaks = self.leaks()
        grown = max((each.rss_mb_per_100 for each in growth(self.looks) if each.process.startswith(OURS)), default=0.0)
        counts = f"{self.processes[0]} processes before, {self.processes[1]} after"
        self.verify("G7", leaks, f"{counts}; memory grows by at most {grown:g} MB per 100 {self.unit}")

    def look(self, wanted: int) -> None:
        """See what the processes hold, now and then."""
        since = self.looks[-1][0] if self.looks else 0
        if self.done >= WARM_UP * wanted and self.done - since >= min(LOOK_EVERY, wanted / 10):
            engine = self.cluster.client().state().engine
            leader = f"engine {engine.pid if engine is not None else 0}"  # it holds more than while it was a standby
            found = look(self.cluster.pid).items()
            self.looks.append((self.done, {name + " in office" * (name == leader): held for name, held in found}))

    def broken(self) -> list[str]:
        """What did not hold, a line each."""
        return [*super().broken(), *self.leaks()]

    def long_receipt(self, broken: list[str]) -> dict[str, Any]:
        """The fields of an EnduranceReceipt."""
        more = {"processes": self.processes, "growth": growth(self.looks)}
        return {**self.long_outcome(broken, max(0, self.epochs)), **more}

    def leaks(self) -> list[str]:
        """What is left, or grows."""
        counts = {"processes": self.processes, "files in /dev/shm": self.shm}
        leaks = [f"{first} {what} before, {last} after" for what, (first, last) in counts.items() if last > first]
        for each in growth(self.looks):
            if not each.process.startswith(OURS):
                continue
            if self.done >= SLOPE_ACTIONS and each.rss_mb_per_100 > SLOPE_MB:
                leaks.append(f"memory of {each.process} grows by {each.rss_mb_per_100} MB per 100 {self.unit}")
            for kind, (first, last) in (("open files", each.files), ("threads", each.threads)):
                if last > first + SLACK:
                    leaks.append(f"{kind} of {each.process}: {first} at first, {last} at last")
        return leaks


def _settled(number: Callable[[], int], expected: int) -> int:
    """The number, once what is ending has ended."""
    with suppress(WaitTimeout):
        until(lambda: number() <= expected, "leftovers to end", SETTLE_S)
    return number()


def _shm() -> int:
    return len(os.listdir("/dev/shm"))  # noqa: S108 - only looked at
