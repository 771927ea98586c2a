"""The cluster that a scenario starts for itself, with what its faults need: failpoints, a small disk, clocks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chaos.faults import clock, disk
from chaos.scenarios.script import CHAOS, Inject, Scenario
from chaos.target.checkpoint import checkpoint
from chaos.target.cluster import ServedCluster

DISK_MB = 512  # etcd sets 64 MB aside for its log, and as much again for the next
OF_THE_MACHINE: dict[str, Callable[[], bool]] = {  # what a fault may need of it -> whether it is there
    "root": lambda: os.geteuid() == 0,
    "strace": lambda: shutil.which("strace") is not None,
    "Linux": lambda: True,
    "a delegated memory cgroup, for the OOM killer": lambda: True,  # without one, the address space runs out instead
}
DISK, CLOCKS = set(disk.FAULTS["disk-full"].needs[1:]), set(clock.FAULTS["clock-jump"].needs)
GIVEN = {CHAOS, "load", *DISK, *CLOCKS}  # by this file


def unable_here(step: Inject, victim: str) -> str:
    """Why this fault cannot be injected into a cluster of the scenario's own; "" if it can."""
    for need in step.needs:
        if need in OF_THE_MACHINE and not OF_THE_MACHINE[need]():
            return f"{step.fault} needs {need}, which is not here"
        if need not in OF_THE_MACHINE and need not in GIVEN:
            return f"{step.fault} needs {need}, which the cluster of a scenario is not"
    return ""


@contextmanager
def own_cluster(scenario: Scenario, model: Path | None, more: Sequence[str] = ()) -> Iterator[ServedCluster]:
    """The cluster; it serves the shipped model if none is named. `more`: flags that the scenario does not name."""
    needs = {need for step in scenario.faults for need in step.needs}
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="elastic-ep-chaos-")))
        state = folder / "state"
        model = checkpoint(model, folder)
        if needs & DISK:
            opened.enter_context(disk.small_disk(state, DISK_MB))
        flags = ("--redundancy", f"{scenario.cluster.redundancy:g}", *map(str, scenario.cluster.flags), *more)
        flags += (CHAOS,) if CHAOS in needs else ()
        environ = clock.environment(state) if needs & CLOCKS else {}
        ranks = scenario.cluster.ranks
        yield opened.enter_context(ServedCluster(model, ranks, state_dir=state, flags=flags, environ=environ))
