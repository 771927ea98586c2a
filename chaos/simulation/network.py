"""The network between simulated hosts: where packets pass, how long they take, and what TCP makes of it.

A connection loses nothing while it lasts, and has everything arrive in order: what a cut or a loss keeps back is sent
again, at intervals that double. So both ends of a one-way cut lack acknowledgements, and one of them receives all.
Processes of one host, and all of them where hosts are not simulated (""), are always connected.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from chaos.simulation.clock import Clock, Worst

ETCD = "etcd"  # the host of the store
RESEND_S, RESEND_MAX_S = 0.2, 3.2  # of the kernel: the first time, and the longest later
SOON_S = 0.03  # a lost packet is sent again as soon as later ones are acknowledged
Way = tuple[str, str]
"""(from, to): hosts."""


def resent_at(since: float, healed: float) -> float:
    """When what was first sent in vain at `since` is sent again after the way has healed."""
    at, pause_s = since + RESEND_S, RESEND_S
    while at < healed:
        pause_s = min(2 * pause_s, RESEND_MAX_S)
        at += pause_s
    return at


class Network:
    """Which ways are cut, slow or lossy. A way may have several faults of a kind at once, and each heals alone."""

    def __init__(self, clock: Clock, chance: Random, hosts: Iterable[str] = ()) -> None:
        self.hosts = tuple(hosts)
        self.boots: Counter[str] = Counter()  # how often a host has lost its power
        self.on_change: list[Callable[[Way], None]] = []  # called after a way was cut or has healed
        self._clock, self._chance = clock, chance
        self._cuts: dict[Way, int] = {}
        self._cut_at: dict[Way, float] = {}
        self._slow: dict[Way, Worst] = {}
        self._lossy: dict[Way, Worst] = {}
        self._quiet: dict[frozenset[str], tuple[float, float]] = {}  # (since when nothing is acknowledged, until when)

    # ---- what is done to it

    def cut(self, ways: Iterable[Way]) -> None:
        """No packet passes these ways."""
        for way in ways:
            self._cuts[way] = self._cuts.get(way, 0) + 1
            if self._cuts[way] == 1:
                self._cut_at[way] = now = self._clock.now
                since, until = self._quiet.get(frozenset(way), (now, now))
                self._quiet[frozenset(way)] = (since if now < until else now, math.inf)
                self._changed(way)

    def heal(self, ways: Iterable[Way]) -> None:
        """Take one cut of each of these ways back."""
        for way in ways:
            self._cuts[way] = max(0, self._cuts.get(way, 0) - 1)
            if not self._cuts[way] and self._cut_at.pop(way, None) is not None:
                if self.connected(*way):
                    since, _ = self._quiet[frozenset(way)]
                    self._quiet[frozenset(way)] = (since, resent_at(since, self._clock.now))
                self._changed(way)

    def heal_all(self) -> None:
        """No fault is left."""
        for way, number in list(self._cuts.items()):
            self.heal([way] * number)
        self._slow.clear()
        self._lossy.clear()

    def slow_down(self, way: Way, by_s: float, seconds: float) -> None:
        """For so many seconds each packet of this way takes longer by `by_s`."""
        self._slow.setdefault(way, Worst(self._clock)).add(by_s, seconds)

    def lose(self, way: Way, share: float, seconds: float) -> None:
        """For so many seconds this share of packets is lost."""
        self._lossy.setdefault(way, Worst(self._clock)).add(share, seconds)

    def _changed(self, way: Way) -> None:
        for call in list(self.on_change):
            call(way)

    # ---- what it is like

    def passes(self, one: str, two: str) -> bool:
        """Whether packets get from one host to the other."""
        return one == two or not self._cuts.get((one, two), 0)

    def connected(self, one: str, two: str) -> bool:
        """Whether packets get there and back."""
        return self.passes(one, two) and self.passes(two, one)

    def cut_s(self, one: str, two: str) -> float:
        """For how long nothing has passed this way; 0 if packets do."""
        return self._clock.now - self._cut_at[one, two] if (one, two) in self._cut_at else 0.0

    def troubled(self, one: str, two: str, within_s: float) -> bool:
        """Whether anything was wrong between them within this time: a cut, or what it had kept back."""
        _, until = self._quiet.get(frozenset((one, two)), (0.0, -math.inf))
        return one != two and self._clock.now < until + within_s

    def extra_s(self, one: str, two: str) -> float:
        """How much longer than usual a message takes, what is lost of it included."""
        slow, lossy = self._slow.get((one, two)), self._lossy.get((one, two))
        seconds, share = slow.now() if slow else 0.0, lossy.now() if lossy else 0.0
        pause_s = 0.0
        while share and self._chance.random() < share:
            pause_s = self._chance.choice((SOON_S, RESEND_S)) if not pause_s else 2 * pause_s
            seconds += pause_s
        return seconds


Sent = tuple[float, Callable[..., None], tuple[Any, ...]]
"""A message: its delay, and what is called with what once it has arrived."""


class Stream:
    """One direction of a connection. What it carries arrives in order, each after its own delay at the earliest."""

    def __init__(self, network: Network, clock: Clock, one: str, two: str) -> None:
        self._network, self._clock = network, clock
        self._one, self._two = one, two
        self._boot = network.boots[one]
        self._last = 0.0
        self._kept: deque[Sent] = deque()
        self._end: Sent | None = None

    def send(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """`call(*args)` when it has arrived."""
        if self._kept or not self._network.passes(self._one, self._two):
            self._kept.append((delay_s, call, args))
            if len(self._kept) == 1:
                self._clock.after(RESEND_S, self._again, RESEND_S)
            return
        self._arrive(delay_s, call, *args)

    def finish(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """The last message: the end. A host that has lost its power in between says that, and nothing else."""
        self._end = (delay_s, call, args)
        self.send(delay_s, call, *args)

    def _arrive(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        delay_s += self._network.extra_s(self._one, self._two) if self._one != self._two else 0.0
        self._last = max(self._last, self._clock.now + delay_s)
        self._clock.after(self._last - self._clock.now, call, *args)

    def _again(self, paused_s: float) -> None:
        if not self._kept:
            return
        if self._network.passes(self._one, self._two):
            kept, self._kept = self._kept, deque()
            if self._boot != self._network.boots[self._one]:
                kept = deque() if self._end is None else deque([self._end])
            for delay_s, call, args in kept:
                self._arrive(delay_s, call, *args)
        else:
            pause_s = min(2 * paused_s, RESEND_MAX_S)
            self._clock.after(pause_s, self._again, pause_s)
