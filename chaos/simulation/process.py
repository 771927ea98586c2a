"""One process of the cluster. It may be killed or stopped, and calls that are due later respect that."""

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
    """Raised in a process to end it in the middle of a call."""


class Process:
    """Anything that runs by itself. `skew_s`: the error of its wall clock."""

    def __init__(self, cluster: Cluster, name: str, at: str = "") -> None:
        """`at`: its host, if hosts are simulated."""
        self.cluster, self.name, self.clock, self.at = cluster, name, cluster.clock, at
        self.random = Random(f"{cluster.seed} {name}")
        self.client = Client(cluster.store, name, self.random, cluster.network, at)
        self.alive = True
        self.stopped = False
        self.ill_until = -1.0  # when it was last stopped or hung
        self.skew_s = 0.0
        self._held: deque[tuple[Call, tuple[Any, ...]]] = deque()
        self._woken = False

    def wall(self) -> float:
        return WALL_S + self.clock.now + self.skew_s

    def after(self, delay_s: float, call: Call, *args: Any) -> None:
        """Call later: not if it is dead by then, and not before it resumes if it is stopped."""
        self.clock.after(delay_s, self.do, call, *args)

    def wake(self, delay_s: float = 0.002) -> None:
        """Call `turn` soon; once, however often this is called before."""
        if not self._woken:
            self._woken = True
            self.after(delay_s, self._awake)

    def turn(self) -> None:
        """What it does when it wakes up."""

    def die(self) -> None:
        self.alive = False
        self._held.clear()

    def stop(self) -> None:
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT. Everything that became due meanwhile is done now."""
        if self.stopped:
            self.stopped, self.ill_until = False, self.clock.now
            while self._held and self.alive and not self.stopped:
                call, args = self._held.popleft()
                self.do(call, *args)

    def _awake(self) -> None:
        self._woken = False
        self.turn()

    def do(self, call: Call, *args: Any) -> None:
        """Call now, or when it resumes."""
        if not self.alive:
            return
        if self.stopped:
            self._held.append((call, args))
            return
        self.cluster.running = self
        try:
            call(*args)
        except (Died, FaultInjected):  # an unexpected error ends a process too
            self.die()
