"""One process of the cluster: it may be killed, or stopped for a while, and what is to be done later asks whether."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any

from chaos.simulation.clock import WALL_S, Call
from chaos.simulation.store import Client
from membership.base.failpoints import FaultInjected

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster


class Died(Exception):
    """A process ends in the middle of what it does."""


class Process:
    """Whatever runs by itself. `skew_s`: how far its time of day is off."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name, self.clock = cluster, name, cluster.clock
        self.random = Random(f"{cluster.seed} {name}")
        self.client = Client(cluster.store, name, self.random)
        self.alive = True
        self.stopped = False
        self.ill_until = -1.0  # when it was last seen stopped or hung
        self.skew_s = 0.0
        self._held: deque[tuple[Call, tuple[Any, ...]]] = deque()
        self._woken = False

    def wall(self) -> float:
        """The time of day as this process has it."""
        return WALL_S + self.clock.now + self.skew_s

    def after(self, delay_s: float, call: Call, *args: Any) -> None:
        """Do that later, if it lives then; not while it is stopped."""
        self.clock.after(delay_s, self._do, call, args)

    def wake(self, delay_s: float = 0.002) -> None:
        """Have `turn` called soon; asked for again, it is called once."""
        if not self._woken:
            self._woken = True
            self.after(delay_s, self._awake)

    def turn(self) -> None:
        """What it does when it wakes."""

    def die(self) -> None:
        """It ends at once."""
        self.alive = False
        self._held.clear()

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT: everything that came meanwhile, now."""
        if self.stopped:
            self.stopped, self.ill_until = False, self.clock.now
            while self._held and self.alive and not self.stopped:
                call, args = self._held.popleft()
                self._do(call, args)

    def _awake(self) -> None:
        self._woken = False
        self.turn()

    def do(self, call: Call, *args: Any) -> None:
        """It does that now."""
        self._do(call, args)

    def _do(self, call: Call, args: tuple[Any, ...]) -> None:
        if not self.alive:
            return
        if self.stopped:
            self._held.append((call, args))
            return
        self.cluster.running = self
        try:
            call(*args)
        except (Died, FaultInjected):  # an error that nobody expects ends a process too
            self.die()
