"""Faults of ranks whose kernels run, made as those of `faults.py`. Drawn where ranks have GPUs."""

from __future__ import annotations

from random import Random

from chaos.simulation.cluster import Cluster
from chaos.simulation.faults import DURATIONS_S, NOTHING, Action
from chaos.simulation.gpus import RUN_ON_S
from chaos.simulation.rank import RankProcess

GPU_FAULTS: dict[str, Action] = {}


def gpu_fault(function: Action) -> Action:
    """Register it. The function's name is its kind."""
    GPU_FAULTS[function.__name__.replace("_", "-")] = function
    return function


def _in_kernels(cluster: Cluster, random: Random) -> RankProcess | None:
    ranks = sorted((r for r in cluster.ranks.values() if r.alive and not r.stopped), key=lambda r: r.key)
    running = [rank for rank in ranks if rank.kernels is not None and not rank.kernels.ended]
    return random.choice(running) if running else None


@gpu_fault
def kill_in_kernels(cluster: Cluster, random: Random) -> str:
    """What it has launched runs on for as long as was measured, or far longer: then the driver does not end it."""
    rank, seconds = _in_kernels(cluster, random), random.choice((RUN_ON_S, RUN_ON_S, *DURATIONS_S))
    if rank is None:
        return NOTHING
    rank.runs_on_s = seconds
    rank.die()
    return f"{rank.name} is killed, and its kernels run on for {seconds:g} s"


@gpu_fault
def stop_in_kernels(cluster: Cluster, random: Random) -> str:
    """SIGSTOP, and SIGCONT later. Its kernels do not stop."""
    rank, seconds = _in_kernels(cluster, random), random.choice(DURATIONS_S)
    if rank is None:
        return NOTHING
    rank.stop()
    cluster.clock.after(seconds, rank.resume)
    return f"{rank.name} is stopped for {seconds:g} s while its kernels run"
