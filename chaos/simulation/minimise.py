"""Shrinks a failing life to the few happenings that it takes: delta debugging (Zeller and Hildebrandt, 2002).

Leaving a happening out changes nothing about what the others draw, so what is left is lived as it was. Only the same
promise counts: a life that breaks another one is another finding.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import msgspec

from chaos.simulation.life import Life, Step, live, setup

LIMIT_S = 60.0

Live = Callable[[int, Sequence[int]], Life]


class Minimal(msgspec.Struct, frozen=True, kw_only=True):
    """The shortest schedule found. `again` is the command that shows it."""

    seed: int
    keep: tuple[int, ...]
    happenings: tuple[Step, ...]
    violation: str
    again: str
    lives: int = 0  # that were lived to find it
    complete: bool = True  # False: time was up before


def promise(violation: str) -> str:
    """Which promise it is: the violation without its numbers, names and lists."""
    words = re.sub(r"\[.*|\{.*", "", violation.partition(": ")[2])
    words = re.sub(r"\w*\(.*?\)", "#", words)
    return re.sub(r"\b\w*\d[\w.]*\b|'.*?'", "#", words).strip()[:60]


def command(seed: int, keep: Sequence[int]) -> str:
    """The one line that reproduces it."""
    return f"elastic-chaos replay --seed {seed} --keep {','.join(map(str, keep)) or 'none'}"


def minimise(
    broken: Life, limit_s: float = LIMIT_S, lived: Live = live, clock: Callable[[], float] = time.monotonic
) -> Minimal:
    """The fewest happenings of this life that still break the same promise, as far as can be found in `limit_s`."""
    search = _Search(broken, lived, clock, clock() + limit_s)
    search.shrink([step.index for step in broken.steps if step.told])
    return Minimal(
        seed=broken.seed,
        keep=tuple(search.keep),
        happenings=search.shown.steps,
        violation=search.shown.violation,
        again=command(broken.seed, search.keep),
        lives=search.lives,
        complete=not search.late,
    )


class _Search:
    def __init__(self, broken: Life, lived: Live, clock: Callable[[], float], deadline: float) -> None:
        self.shown, self.lives = broken, 0
        self.keep = [step.index for step in broken.steps] or list(range(len(setup(broken.seed).schedule)))
        self._promise, self._lived, self._clock, self._deadline = promise(broken.violation), lived, clock, deadline

    @property
    def late(self) -> bool:
        """Whether time is up."""
        return self._clock() >= self._deadline

    def shrink(self, effective: list[int]) -> None:
        """Leave out what did nothing; then ever smaller chunks, until no single one can be left out."""
        self._breaks(effective)
        self._breaks([])
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
        """Whether these alone break the promise; then they are what is kept."""
        self.lives += 1
        life = self._lived(self.shown.seed, keep)
        if not life.violation or promise(life.violation) != self._promise:
            return False
        self.keep, self.shown = keep, life
        return True
