"""The hunt for each planted bug, until it is caught or the lives are spent; then the same with nothing planted.

Without that control a catch would mean nothing: a suite that fails anyway catches everything. It passes every check,
and lives every life in which a bug was caught.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from statistics import median

import msgspec

from chaos.mutants.bug import SIMULATE, Bug
from chaos.mutants.catch import Catch
from chaos.mutants.plant import planted

FIRST = 1  # seed of the first life: a bug is caught in the same life each time
LIVES = 250  # in which a planted bug must show
SHARE = 10  # lives of the control in one process
LIMIT_S = 240.0  # for one catcher
SAID = 300  # characters of what broke


class Hunted(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one bug. `how`: what broke; or, if it was not caught, why it is not known whether it would be."""

    bug: str
    guards: str
    caught_by: str
    caught: bool
    how: str = ""
    seed: int = 0
    lives: int = 0
    seconds: float = 0.0
    events: int | None = None  # in the shortest schedule that shows it; None: not known


class HuntReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """`control` says what broke though nothing was planted; then no catch means anything."""

    ok: bool
    planted: int
    caught: int
    lives: int  # the budget
    control: tuple[str, ...] = ()
    median_events: float | None = None
    seconds: float
    bugs: tuple[Hunted, ...] = ()


def hunt(
    bugs: Sequence[Bug], jobs: int, tell: Callable[[Hunted], None] = lambda found: None, lives: int = LIVES
) -> HuntReceipt:
    """Hunt for all of them in `jobs` processes; `tell` hears of each."""
    began = time.monotonic()
    pool = ThreadPoolExecutor(jobs)
    try:
        control, found = _all(bugs, pool, tell, lives)
    finally:
        pool.shutdown(cancel_futures=True)
    caught = sum(each.caught for each in found)
    return HuntReceipt(
        ok=caught == len(bugs) and not control,
        planted=len(bugs),
        caught=caught,
        lives=lives,
        control=control,
        median_events=_median(each.events for each in found),
        seconds=round(time.monotonic() - began, 1),
        bugs=found,
    )


def _all(
    bugs: Sequence[Bug], pool: Executor, tell: Callable[[Hunted], None], lives: int
) -> tuple[tuple[str, ...], tuple[Hunted, ...]]:
    """What broke where nothing is planted; and what became of each bug."""
    hunts = [pool.submit(_hunt, bug, lives, tell) for bug in bugs]
    found = tuple(each.result(timeout=LIMIT_S * len(hunts)) for each in hunts)
    caught = sorted({each.seed for each in found if each.seed})
    wanted = [(SIMULATE, caught[done : done + SHARE]) for done in range(0, len(caught), SHARE)]
    wanted += [(name, []) for name in sorted({bug.caught_by for bug in bugs} - {SIMULATE})]
    controls = [(name, pool.submit(_catch, None, name, seeds)) for name, seeds in wanted]
    broken = ((name, done.result(timeout=LIMIT_S * len(controls)).how) for name, done in controls)
    return tuple(f"{name}: {how}" for name, how in broken if how), found


def _seeds(bug: Bug, lives: int) -> list[int]:
    """Which lives are lived: the one that showed it once, and so many others, the same each time."""
    return list(dict.fromkeys([*([bug.shown_by] if bug.shown_by else []), *range(FIRST, FIRST + lives)]))


def _median(events: Iterable[int | None]) -> float | None:
    known = [number for number in events if number is not None]
    return float(median(known)) if known else None


def _hunt(bug: Bug, lives: int, tell: Callable[[Hunted], None]) -> Hunted:
    catch = _catch(bug, bug.caught_by, _seeds(bug, lives))
    found = Hunted(
        bug=bug.name,
        guards=bug.guards,
        caught_by=bug.caught_by,
        caught=bool(catch.how) and catch.sure,
        how=catch.how[:SAID],
        seed=catch.seed,
        lives=catch.lives,
        seconds=round(catch.seconds, 2),
        events=catch.events,
    )
    tell(found)
    return found


def _catch(bug: Bug | None, catcher: str, seeds: Sequence[int]) -> Catch:
    """Try to catch it in a process of its own, which finds the planted tree first."""
    with planted(bug) as tree:
        program = [sys.executable, "-m", "chaos.mutants.catch", str(tree), catcher, *map(str, seeds)]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        try:
            ended = subprocess.run(
                program, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Catch(how=f"{catcher} did not end within {LIMIT_S:g} s", sure=False, seconds=LIMIT_S)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return Catch(how=f"{catcher} ended with status {ended.returncode}: {last}", sure=False)
        return msgspec.json.decode(ended.stdout.splitlines()[-1], type=Catch)
