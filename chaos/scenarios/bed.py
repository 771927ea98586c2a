"""The cluster that a scenario starts for itself, with what its faults need: failpoints, a small disk, clocks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chaos.faults import clock, disk
from chaos.scenarios.dry_run import CHAOS, needs_of
from chaos.scenarios.script import Blow, Scenario
from chaos.target.cluster import ServedCluster
from elastic.demo.model import write_demo_model

DISK_MB = 512  # etcd sets 64 MB aside for its log, and as much again for the next
OF_THE_MACHINE: dict[str, Callable[[], bool]] = {  # what a fault may need of it -> whether it is there
    "root": lambda: os.geteuid() == 0,
    "strace": lambda: shutil.which("strace") is not None,
    "Linux": lambda: True,
    "a delegated memory cgroup, for the OOM killer": lambda: True,  # without one, the address space is what runs out
}
GIVEN = (CHAOS, "load", *disk.FAULTS["disk-full"].needs[1:], *clock.FAULTS["clock-jump"].needs)  # by this file


def unable_here(blow: Blow, victim: str) -> str:
    """Why this fault cannot be dealt on a cluster of the scenario's own; "" if it can."""
    for need in needs_of(blow):
        if need in OF_THE_MACHINE and not OF_THE_MACHINE[need]():
            return f"{blow.fault} needs {need}, which is not here"
        if need not in OF_THE_MACHINE and need not in GIVEN:
            return f"{blow.fault} needs {need}, which the cluster of a scenario is not"
    return ""


@contextmanager
def bed(scenario: Scenario, model: Path | None) -> Iterator[ServedCluster]:
    """The cluster; the shipped model if none is named."""
    needs = {need for blow in scenario.blows for need in needs_of(blow)}
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="elastic-ep-chaos-")))
        state = folder / "state"
        if model is None:
            model = folder / "demo-moe"
            write_demo_model(model)
        if needs & set(disk.FAULTS["disk-full"].needs[1:]):
            opened.enter_context(disk.small_disk(state, DISK_MB))
        clocks = needs & set(clock.FAULTS["clock-jump"].needs)
        flags = ("--redundancy", f"{scenario.cluster.redundancy:g}", *scenario.cluster.flags)
        yield opened.enter_context(
            ServedCluster(
                model, scenario.cluster.ranks, state_dir=state,
                flags=(*flags, CHAOS) if CHAOS in needs else flags,
                environ=clock.environment(state) if clocks else {},
            )
        )  # fmt: skip
