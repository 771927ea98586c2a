"""Hunts each mutant until it is caught or the budget is spent; then the control: the same with no mutant.

Without the control a catch would mean nothing, because tests that fail anyway catch everything. The unchanged product
must pass every named test, and every simulated run in which a mutant was caught.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from statistics import median

import msgspec

from chaos.mutants.catch import PYTEST, Catch
from chaos.mutants.mutant import SIMULATE, Mutant, Shown
from chaos.mutants.tree import planted, require_tests

FIRST = 1  # seed of the first simulated run; fixed, so that a mutant is caught in the same run each time
LIVES = 250  # simulated runs within which a mutant must be caught
CONTROL_SHARE = 10  # simulated runs of the control per process
LIMIT_S = 600.0  # for one process, at the lowest priority beside tests
HOW_LENGTH = 300  # characters of what broke
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins would take most of the time


class Hunted(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one mutant. `how`: what broke; if it was not caught, why it is not known whether it would be."""

    bug: str
    guards: str
    caught_by: str
    caught: bool
    how: str = ""
    seed: int = 0
    shown: Shown | None = None  # the shortest schedule of this seed that shows it
    lives: int = 0
    seconds: float = 0.0  # this depends on what else runs
    cpu_s: float = 0.0  # of processors
    events: int | None = None  # in the shortest schedule that shows it; None: unknown


class HuntReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of all mutants. `control`: what broke in the unchanged product; then no catch means anything."""

    ok: bool
    planted: int
    caught: int
    lives: int  # the budget
    control: tuple[str, ...] = ()
    median_events: float | None = None
    seconds: float
    cpu_s: float = 0.0  # of processors, for all mutants and the control
    bugs: tuple[Hunted, ...] = ()


Control = tuple[str, Future[Catch]]
"""What looks at the unchanged product, and what it finds."""


def hunt(
    mutants: Sequence[Mutant], jobs: int, on_result: Callable[[Hunted], None] = lambda found: None, lives: int = LIVES
) -> HuntReceipt:
    """Hunt all of them with `jobs` processes at a time. ConfigError where the tests are missing that they name."""
    if any(mutant.tests for mutant in mutants):
        require_tests()
    began = time.monotonic()
    pool = ThreadPoolExecutor(jobs)
    try:
        tested = _control_tests(mutants, pool)
        found = _hunt_all(mutants, pool, on_result, lives)
        controls = [
            (catcher, done.result(LIMIT_S * len(mutants))) for catcher, done in (*tested, *_control_runs(found, pool))
        ]
    finally:
        pool.shutdown(cancel_futures=True)
    caught = sum(each.caught for each in found)
    control = tuple(f"{catcher}: {done.how}" for catcher, done in controls if done.how)
    return HuntReceipt(
        ok=caught == len(mutants) and not control,
        planted=len(mutants),
        caught=caught,
        lives=lives,
        control=control,
        median_events=_median(each.events for each in found),
        seconds=round(time.monotonic() - began, 1),
        cpu_s=round(sum(each.cpu_s for each in found) + sum(done.cpu_s for _, done in controls), 1),
        bugs=found,
    )


def _hunt_all(
    mutants: Sequence[Mutant], pool: Executor, on_result: Callable[[Hunted], None], lives: int
) -> tuple[Hunted, ...]:
    hunts = [pool.submit(_hunt, mutant, lives, on_result) for mutant in mutants]
    return tuple(each.result(timeout=LIMIT_S * len(hunts)) for each in hunts)


def _control_tests(mutants: Sequence[Mutant], pool: Executor) -> list[Control]:
    """All named tests in the unchanged product. They take longest, and so begin first."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    return [(PYTEST, pool.submit(_catch, None, PYTEST, tests))] if tests else []


def _control_runs(found: Sequence[Hunted], pool: Executor) -> list[Control]:
    """The simulated runs that have shown a mutant, in the unchanged product."""
    shown = [each.shown for each in found if each.shown]
    whole = [Shown(run.seed, hosts=run.hosts, gpus=run.gpus) for run in shown]
    runs = list(dict.fromkeys(run for both in zip(shown, whole, strict=True) for run in both))
    shares = [_simulated(runs[at : at + CONTROL_SHARE]) for at in range(0, len(runs), CONTROL_SHARE)]
    return [(SIMULATE, pool.submit(_catch, None, SIMULATE, share)) for share in shares]


def _median(events: Iterable[int | None]) -> float | None:
    known = [number for number in events if number is not None]
    return float(median(known)) if known else None


def _hunt(mutant: Mutant, lives: int, on_result: Callable[[Hunted], None]) -> Hunted:
    if mutant.tests:
        catch = _catch(mutant, PYTEST, mutant.tests)
    else:
        runs = [
            *filter(None, [mutant.shown]),
            *(Shown(seed, hosts=mutant.hosts, gpus=mutant.gpus) for seed in range(FIRST, FIRST + lives)),
        ]
        catch = _catch(mutant, SIMULATE, _simulated(runs))
    found = Hunted(
        bug=mutant.name,
        guards=mutant.guards,
        caught_by=mutant.caught_by,
        caught=bool(catch.how) and catch.sure,
        how=catch.how[:HOW_LENGTH],
        seed=catch.shown.seed if catch.shown else 0,
        shown=catch.shown,
        lives=catch.lives,
        seconds=round(catch.seconds, 2),
        cpu_s=round(catch.cpu_s, 2),
        events=catch.events,
    )
    on_result(found)
    return found


def _simulated(runs: Sequence[Shown]) -> list[str]:
    """As arguments."""
    return [msgspec.json.encode(runs).decode()]


def _catch(mutant: Mutant | None, catcher: str, arguments: Sequence[str]) -> Catch:
    """Try to catch it in a process of its own, which imports the mutant's tree."""
    with planted(mutant) as tree:
        program = [sys.executable, "-m", "chaos.mutants.catch", str(tree), catcher, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tree), **ENVIRONMENT}
        try:
            ended = subprocess.run(
                program, cwd=tree, env=environment, capture_output=True, encoding="utf-8", timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Catch(how=f"{catcher} did not end within {LIMIT_S:g} s", sure=False)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no output"])[-1]
            return Catch(how=f"{catcher} ended with status {ended.returncode}: {last}", sure=False)
        return msgspec.json.decode(ended.stdout.splitlines()[-1], type=Catch)
