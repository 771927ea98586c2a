"""Which rank keeps a step waiting: the rung of failure detection between a process's death and the end of its lease.

Ranks wait for each other inside a step, so the rank that has not answered need not be the one that hangs. Only a rank
that does nothing is evicted: it stays stopped (SIGSTOP), or its main thread sleeps elsewhere than on its doorbell (a
native hang, with the interpreter's lock or without). A rank that computes, waits for a processor or a disk, or wakes on
its doorbell is at work or waits for another rank: it may be flagged as slow (`pace.py`), but is not evicted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from membership.base.enums import DetectedBy
from membership.base.rank_id import RankId
from membership.base.timing import HUNG_S, LATE_MAX_S, LATE_S, STOPPED_S

TICK_S = 0.05  # between two looks at ranks that keep a step waiting
LATE_FACTOR = 3.0
HUNG_FACTOR = 8.0  # x the usual step: a long kernel may keep the main thread waiting
STEPS_KEPT = 200
BUSY_SHARE = 0.1  # of one processor: what a hung process's other threads may use


@dataclass(frozen=True)
class Look:
    """What one look at a rank saw: in /proc, and on its liveness page."""

    state: str  # of its main thread, as /proc says: R running, S sleeping, D disk, T stopped
    main_s: float = 0.0  # processor time of its main thread
    others_run: bool = False  # whether another thread of it runs, wants to, or waits for a disk
    all_s: float = 0.0  # processor time of all its threads
    heartbeats: int = 0
    steps: int = 0
    turns: int = 0  # how often its main thread woke on its doorbell; 0: it has no such counter


@dataclass(frozen=True)
class Suspect:
    """One rank since it last showed progress."""

    first: Look
    quiet_s: float = 0.0
    stopped_s: float = 0.0
    looks: int = 0
    others_ran: int = 0  # looks in which another thread of it ran


def assess(suspect: Suspect | None, look: Look, passed_s: float, hung_s: float) -> tuple[Suspect, DetectedBy | None]:
    """What the look changes, and the sign by which the rank must be evicted, if any."""
    if suspect is None:
        return Suspect(look), None
    first = suspect.first
    moved = (look.turns, look.steps) != (first.turns, first.steps) or look.main_s > first.main_s
    if look.state in "Tt" and not moved:
        stopped = replace(suspect, stopped_s=suspect.stopped_s + passed_s)
        return stopped, DetectedBy.STOPPED if stopped.stopped_s >= STOPPED_S else None
    if moved or look.state != "S" or not look.turns:
        return Suspect(look), None
    quiet = replace(
        suspect, quiet_s=suspect.quiet_s + passed_s, stopped_s=0.0, looks=suspect.looks + 1,
        others_ran=suspect.others_ran + look.others_run,
    )  # fmt: skip
    if quiet.quiet_s < hung_s:
        return quiet, None
    interpreter_free = look.heartbeats > first.heartbeats + 1
    idle = quiet.others_ran * 2 < quiet.looks and look.all_s - first.all_s < BUSY_SHARE * quiet.quiet_s
    return quiet, DetectedBy.HUNG if interpreter_free or idle else None


def late_after_s(usual_s: float) -> float:
    """Lateness threshold for a step whose p99 duration is `usual_s`."""
    return min(LATE_MAX_S, max(LATE_S, LATE_FACTOR * usual_s))


@dataclass
class Watchdog:
    """The step in flight and the ranks it waits for. No I/O: the caller passes looks and the time."""

    due: float = math.inf  # when to call `watch`
    since: float = math.inf  # when the step under way began
    _waiting: set[RankId] = field(default_factory=set)
    _step: int = -1
    _took: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    _suspects: dict[RankId, Suspect] = field(default_factory=dict)
    _watched_at: float = math.inf
    _hung_s: float = HUNG_S

    def began(self, step: int, ranks: Iterable[RankId], now: float) -> None:
        """These ranks owe an answer to this step."""
        self._waiting = set(ranks)
        self._step, self.since = step, now
        self._suspects.clear()
        self.due = now + LATE_S if self._waiting else math.inf

    def answered(self, key: RankId, step: int, now: float) -> None:
        """One of them has answered."""
        if step == self._step:
            self._waiting.discard(key)
            if not self._waiting and self.due < math.inf:
                self._took.append(now - self.since)
                self.due = math.inf

    def gone(self, key: RankId) -> None:
        """The rank is out of use."""
        self._waiting.discard(key)
        self._suspects.pop(key, None)
        if not self._waiting:
            self.due = math.inf

    def waits_for(self, key: RankId) -> bool:
        """Whether this rank has not answered."""
        return key in self._waiting

    def watch(self, looks: Mapping[RankId, Look], now: float) -> list[tuple[RankId, DetectedBy]]:
        """Ranks that do nothing, by these looks, each with its sign. Time when we did not run does not count."""
        if not self._suspects:
            usual_s = self._usual_s()
            if now < (late := self.since + late_after_s(usual_s)):
                self.due = late
                return []
            self._watched_at, self._hung_s = now, max(HUNG_S, HUNG_FACTOR * usual_s)
        passed_s = min(now - self._watched_at, 2 * TICK_S)
        self._watched_at, self.due = now, now + TICK_S
        evicted = []
        for key, look in looks.items():
            self._suspects[key], sign = assess(self._suspects.get(key), look, passed_s, self._hung_s)
            if sign is not None:
                evicted.append((key, sign))
        return evicted

    def _usual_s(self) -> float:
        took = sorted(self._took)
        return took[int(0.99 * (len(took) - 1))] if took else 0.0
