"""Shrinks a failing episode to the few events that it takes: delta debugging (Zeller and Hildebrandt, 2002).

Leaving an event out changes nothing about what the others draw, but it does change which messages are on their way
when they come. A race may then be missed although all of its events are there. So each attempt is run with several
timings, more of them the shorter it is. Only the same invariant counts: one that breaks another is another finding.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import msgspec

from chaos.simulation.episode import Episode, Step, run_episode, setup

LIMIT_S = 60.0
LAST = (2, 3, 4, 6, 9)  # numbers of events before the end that are tried alone
TIMINGS = ((0, 1), (1, 2), (3, 10), (6, 6), (12, 3))  # (at most this many events, number of timings)
LONG_TIMINGS = 2

RunEpisode = Callable[[int, Sequence[int], int], Episode]


class Minimal(msgspec.Struct, frozen=True, kw_only=True):
    """The shortest schedule found. `again` is the command that shows it."""

    seed: int
    keep: tuple[int, ...]
    events: tuple[Step, ...] = msgspec.field(name="happenings")
    violation: str
    again: str
    timing: int = 0
    episodes: int = msgspec.field(name="lives", default=0)  # that were run to find it
    complete: bool = True  # False: the time was up before


def invariant_of(violation: str) -> str:
    """Which invariant it is: the violation without its numbers, names and lists."""
    words = re.sub(r"\[.*|\{.*", "", violation.partition(": ")[2])
    words = re.sub(r"\w*\(.*?\)", "#", words)
    return re.sub(r"\b\w*\d[\w.]*\b|'.*?'", "#", words).strip()[:60]


def command(seed: int, keep: Sequence[int] | None, timing: int = 0, hosts: int = 0, *, gpus: bool = False) -> str:
    """The command line that reproduces it; `keep` None: all of its events."""
    kept = "" if keep is None else f" --keep {','.join(map(str, keep)) or 'none'}"
    over = (f" --hosts {hosts}" if hosts else "") + " --gpus" * gpus
    timed = f" --timing {timing}" if timing else ""
    return f"elastic-chaos replay --seed {seed}{over}{kept}{timed}"


def minimise(
    broken: Episode,
    limit_s: float = LIMIT_S,
    run: RunEpisode | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Minimal:
    """The fewest events of this episode that still break the same invariant, as far as `limit_s` allows."""

    def again(seed: int, keep: Sequence[int], timing: int) -> Episode:
        return run_episode(seed, keep, timing=timing, hosts=broken.hosts, gpus=broken.gpus)

    search = _Search(broken, run or again, clock, clock() + limit_s)
    search.shrink([step for step in broken.steps if step.outcome])
    return Minimal(
        seed=broken.seed,
        keep=tuple(search.keep),
        events=search.shown.steps,
        violation=search.shown.violation,
        again=command(broken.seed, search.keep, search.timing, broken.hosts, gpus=broken.gpus),
        timing=search.timing,
        episodes=search.episodes,
        complete=not search.late,
    )


def _one_of_each_first(steps: Sequence[Step]) -> list[int]:
    """All events from the last to the first, with the last of each kind before the others."""
    latest = {step.kind: step.index for step in steps}
    rest = [step.index for step in steps if latest[step.kind] != step.index]
    return sorted(latest.values(), reverse=True) + rest[::-1]


class _Search:
    def __init__(self, broken: Episode, run: RunEpisode, clock: Callable[[], float], deadline: float) -> None:
        self.shown, self.timing, self.episodes = broken, 0, 0
        whole = setup(broken.seed, broken.hosts, gpus=broken.gpus).schedule
        self.keep = [step.index for step in broken.steps] or list(range(len(whole)))
        self._run, self._clock, self._deadline = run, clock, deadline
        self._invariant = invariant_of(broken.violation)

    @property
    def late(self) -> bool:
        return self._clock() >= self._deadline

    def shrink(self, steps: Sequence[Step]) -> None:
        """Try no events, each one alone with one timing, and the last few. Then leave out ever smaller chunks.

        With all timings a single event takes as long as ten, and most schedules are shown by none that is alone.
        """
        effective = [step.index for step in steps]
        if self._breaks([]) or any(self._breaks([index], 1) for index in _one_of_each_first(steps)):
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
        """Try without each chunk, from the end: later events depend on earlier ones."""
        shrunk, end = False, len(self.keep)
        while end > 0 and not self.late:
            start = max(0, end - chunk)
            shrunk |= self._breaks(self.keep[:start] + self.keep[end:])
            end = start
        return shrunk

    def _breaks(self, keep: list[int], timings: int = 0) -> bool:
        """Whether these alone break the invariant with any timing (0: as many as `TIMINGS`). If so, they are kept."""
        timings = timings or next((timings for most, timings in TIMINGS if len(keep) <= most), LONG_TIMINGS)
        for timing in dict.fromkeys((self.timing, *range(timings))):
            if self.late:
                return False
            self.episodes += 1
            episode = self._run(self.shown.seed, keep, timing)
            if episode.violation and invariant_of(episode.violation) == self._invariant:
                self.keep, self.shown, self.timing = keep, episode, timing
                return True
        return False
