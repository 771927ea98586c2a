"""Shrinks a failing life to the few happenings that it takes: delta debugging (Zeller and Hildebrandt, 2002).

Leaving a happening out changes nothing about what the others draw, but it does change what is on its way when they
come: a race may be missed though all that it takes is there. So each attempt is lived with several timings, more of
them the shorter it is. Only the same promise counts: a life that breaks another one is another finding.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import msgspec

from chaos.simulation.life import Life, Step, live, setup

LIMIT_S = 60.0
LAST = (2, 3, 4, 6, 9)  # so many happenings before the end are tried alone
TIMINGS = ((0, 1), (1, 2), (3, 10), (6, 6), (12, 3))  # up to so many happenings: so many timings
LONG_TIMINGS = 2

Live = Callable[[int, Sequence[int], int], Life]


def with_timing(seed: int, keep: Sequence[int], timing: int) -> Life:
    """One attempt."""
    return live(seed, keep, timing=timing)


class Minimal(msgspec.Struct, frozen=True, kw_only=True):
    """The shortest schedule found. `again` is the command that shows it."""

    seed: int
    keep: tuple[int, ...]
    happenings: tuple[Step, ...]
    violation: str
    again: str
    timing: int = 0
    lives: int = 0  # that were lived to find it
    complete: bool = True  # False: time was up before


def promise(violation: str) -> str:
    """Which promise it is: the violation without its numbers, names and lists."""
    words = re.sub(r"\[.*|\{.*", "", violation.partition(": ")[2])
    words = re.sub(r"\w*\(.*?\)", "#", words)
    return re.sub(r"\b\w*\d[\w.]*\b|'.*?'", "#", words).strip()[:60]


def command(seed: int, keep: Sequence[int], timing: int = 0) -> str:
    """The one line that reproduces it."""
    timed = f" --timing {timing}" if timing else ""
    return f"elastic-chaos replay --seed {seed} --keep {','.join(map(str, keep)) or 'none'}{timed}"


def minimise(
    broken: Life, limit_s: float = LIMIT_S, lived: Live = with_timing, clock: Callable[[], float] = time.monotonic
) -> Minimal:
    """The fewest happenings of this life that still break the same promise, as far as can be found in `limit_s`."""
    search = _Search(broken, lived, clock, clock() + limit_s)
    search.shrink([step for step in broken.steps if step.told])
    return Minimal(
        seed=broken.seed,
        keep=tuple(search.keep),
        happenings=search.shown.steps,
        violation=search.shown.violation,
        again=command(broken.seed, search.keep, search.timing),
        timing=search.timing,
        lives=search.lives,
        complete=not search.late,
    )


def _one_of_each_first(steps: Sequence[Step]) -> list[int]:
    """All happenings from the last to the first, but the last of each kind before the others."""
    latest = {step.kind: step.index for step in steps}
    rest = [step.index for step in steps if latest[step.kind] != step.index]
    return sorted(latest.values(), reverse=True) + rest[::-1]


class _Search:
    def __init__(self, broken: Life, lived: Live, clock: Callable[[], float], deadline: float) -> None:
        self.shown, self.timing, self.lives = broken, 0, 0
        self.keep = [step.index for step in broken.steps] or list(range(len(setup(broken.seed).schedule)))
        self._promise, self._lived, self._clock, self._deadline = promise(broken.violation), lived, clock, deadline

    @property
    def late(self) -> bool:
        """Whether time is up."""
        return self._clock() >= self._deadline

    def shrink(self, steps: Sequence[Step]) -> None:
        """Try none, each one alone, the last few; leave out what did nothing, then ever smaller chunks of the rest."""
        effective = [step.index for step in steps]
        if self._breaks([]) or any(self._breaks([index]) for index in _one_of_each_first(steps)):
            return
        if not any(self._breaks(effective[-last:]) for last in LAST if last < len(effective)):
            self._breaks(effective)
        chunk = max(1, len(self.keep) // 2)
        while self.keep and not self.late:
            shrunk = self._without_chunks(chunk)
            if chunk == 1 and not shrunk:
                return
            chunk = max(1, chunk // 2) if not shrunk or chunk > len(self.keep) else chunk

    def _without_chunks(self, chunk: int) -> bool:
        """From the end: what comes later depends on what was before."""
        shrunk, end = False, len(self.keep)
        while end > 0 and not self.late:
            start = max(0, end - chunk)
            shrunk |= self._breaks(self.keep[:start] + self.keep[end:])
            end = start
        return shrunk

    def _breaks(self, keep: list[int]) -> bool:
        """Whether these alone break the promise, with one timing or another; then they are what is kept."""
        timings = next((timings for most, timings in TIMINGS if len(keep) <= most), LONG_TIMINGS)
        for timing in dict.fromkeys((self.timing, *range(timings))):
            if self.late:
                return False
            self.lives += 1
            life = self._lived(self.shown.seed, keep, timing)
            if life.violation and promise(life.violation) == self._promise:
                self.keep, self.shown, self.timing = keep, life, timing
                return True
        return False
