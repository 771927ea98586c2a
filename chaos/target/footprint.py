"""What a cluster's long-lived processes hold (memory, open files, threads), and whether that grows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import linear_regression

import msgspec
import psutil

from membership.base.process_stats import command_words

ROLES = ("controller", "agent", "engine", "gateway")
MB = float(1 << 20)
ONCE_MB = 2.0  # that a process may grow by at once: the interpreter's table of interned strings doubles, to 1.9 MB
SETTLED_S = 10.0  # a younger process is still starting, and says nothing of those that live on


class Footprint(msgspec.Struct, frozen=True):
    """One process at one moment."""

    rss_mb: float
    files: int
    threads: int


class Growth(msgspec.Struct, frozen=True):
    """One process over the run, from its first look after the warm-up to its last."""

    process: str
    rss_mb: tuple[float, float]
    rss_mb_per_100: float  # without one rise, of ONCE_MB at most
    files: tuple[int, int]
    threads: tuple[int, int]


def look(supervisor: int) -> dict[str, Footprint]:
    """Every process of the cluster that should outlive its ranks, by name."""
    parent = psutil.Process(supervisor)
    found = {"supervisor": _footprint(parent)}
    for child in parent.children(recursive=True):
        try:
            name = _name(child)
            if name and time.time() - child.create_time() > SETTLED_S:
                found[name] = _footprint(child)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # a rank that is just dying
    return found


def processes(supervisor: int) -> int:
    """How many processes the cluster consists of, supervisor included."""
    return 1 + len(psutil.Process(supervisor).children(recursive=True))


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of y over x; 0.0 where there is none to be had."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    return linear_regression([x for x, _ in points], [y for _, y in points]).slope


def without_one_rise(values: Sequence[float]) -> list[float]:
    """The values without the greatest rise from one to the next, of which ONCE_MB at most is left out.

    What leaks grows all the time: it keeps all its rises but one. A table that is enlarged is one rise.
    """
    rises = [last - first for first, last in pairwise(values)]
    if rises and (most := max(rises)) > 0:
        rises[rises.index(most)] -= min(most, ONCE_MB)
    return list(accumulate(rises, initial=values[0])) if values else []


def growth(looks: Sequence[tuple[int, dict[str, Footprint]]]) -> tuple[Growth, ...]:
    """Of each process that is in all `looks`: (number of actions so far, footprint of each process)."""
    if not looks:
        return ()
    names = sorted(set.intersection(*(set(found) for _, found in looks)))
    return tuple(_growth(name, [(done, found[name]) for done, found in looks]) for name in names)


def _growth(name: str, points: Sequence[tuple[int, Footprint]]) -> Growth:
    first, last = points[0][1], points[-1][1]
    held_mb = without_one_rise([found.rss_mb for _, found in points])
    return Growth(
        name,
        (round(first.rss_mb, 1), round(last.rss_mb, 1)),
        round(100 * slope([(done, mb) for (done, _), mb in zip(points, held_mb, strict=True)]), 2),
        (first.files, last.files),
        (first.threads, last.threads),
    )


def _name(process: psutil.Process) -> str:
    command = command_words(process.pid)
    if command[1:3] == ["-m", "elastic.cli"] and command[3:4] and command[3] in ROLES:
        return f"{command[3]} {process.pid}"
    if command and Path(command[0]).name == "etcd":
        return "etcd"
    names = (f"{name} {process.pid}" for name in ("forkserver", "zygote"))  # a new agent has a new one
    return next((name for name in names if command and f"elastic-ep::{name.split()[0]}" in command[0]), "")


def _footprint(process: psutil.Process) -> Footprint:
    with process.oneshot():
        return Footprint(process.memory_info().rss / MB, process.num_fds(), process.num_threads())
