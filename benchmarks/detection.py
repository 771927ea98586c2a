"""From kill -9 of a rank to its mask on busy cores, and tokens/s, under several ways to schedule the processes.

One served demo cluster; before each kill the next setting is put on its running processes, so that all settings meet
the same load (paired). `python -m benchmarks.detection [--rounds 10] [--settings none,slice,...]`; taking a nice value
back needs root. First column: from the signal until the engine's watcher knew (the victim itself must get a core to
die); second: from there to the mask.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.workload.streams import Workload
from elastic.demo.model import write_demo_model
from membership.base.events import Event

SYS_SCHED_SETATTR = 314
SETTINGS: dict[str, dict[str, int]] = {
    "none": {},
    "slice": {"engine_slice_us": 100},
    "agent": {"engine_slice_us": 100, "agent_slice_us": 100},
    "nice1": {"rank_nice": 1},
    "nice5": {"rank_nice": 5},
    "both": {"engine_slice_us": 100, "rank_nice": 1},
    "ranks": {"engine_slice_us": 100, "rank_slice_us": 500},
}


class SchedAttr(ctypes.Structure):
    """struct sched_attr of sched_setattr(2), its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64), ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64), ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )  # fmt: skip


def schedule(pid: int, *, nice: int = 0, slice_us: int = 0) -> None:
    """Put a nice value and a slice (0: the kernel's) on all threads of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    for task in os.listdir(f"/proc/{pid}/task"):
        attributes = SchedAttr(size=ctypes.sizeof(SchedAttr), nice=nice, runtime=slice_us * 1000)
        if libc.syscall(SYS_SCHED_SETATTR, int(task), ctypes.byref(attributes), 0):
            raise OSError(ctypes.get_errno(), f"sched_setattr({task})")


def apply(cluster: ServedCluster, status: dict[str, object], setting: dict[str, int]) -> None:
    """Schedule the cluster's processes so."""
    state = cluster.client().state()
    if state.engine is None:
        raise RuntimeError("there is no engine")
    schedule(state.engine.pid, slice_us=setting.get("engine_slice_us", 0))
    for agent in state.agents.values():
        schedule(agent.pid, slice_us=setting.get("agent_slice_us", 0))
    for rank in state.ranks.values():
        schedule(rank.pid, nice=setting.get("rank_nice", 0), slice_us=setting.get("rank_slice_us", 0))


def tokens(cluster: ServedCluster) -> float:
    """Tokens sent so far."""
    lines = httpx.get(f"{cluster.url}/metrics", timeout=10, trust_env=False).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("elastic_ep_tokens_total"))


def trial(cluster: ServedCluster, ranks: int, victim: int, setting: dict[str, int], pace_s: float) -> dict[str, float]:
    """Measure the pace under a setting, then kill a rank."""
    status = cluster.wait_serving(ranks)
    apply(cluster, status, setting)
    before, began = tokens(cluster), time.monotonic()
    time.sleep(pace_s)
    pace = (tokens(cluster) - before) / (time.monotonic() - began)
    pid = next(rank["pid"] for rank in status["ranks"] if rank["rank"] == victim)
    killed = kill(pid)

    def of_victim(kind: str) -> Event:
        return cluster.wait_event(lambda e: e.kind == kind and e.rank == victim and e.ts >= killed.sent_at, kind)

    masked, recovered = of_victim("rank_masked"), of_victim("rank_recovered")
    total_ms = (masked.ts - killed.sent_at) * 1000
    in_engine_ms = float(masked.fields["ms"])
    return {
        "noticed": total_ms - in_engine_ms, "masking": in_engine_ms, "masked": total_ms,
        "recovered": (recovered.ts - killed.sent_at) * 1000, "tokens/s": pace,
    }  # fmt: skip


def main() -> None:
    """Run the rounds and print medians (and the worst) per setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--pace-s", type=float, default=1.5)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    options = parser.parse_args()
    names = options.settings.split(",")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        write_demo_model(Path(folder) / "model")
        with ServedCluster(Path(folder) / "model", options.ranks, state_dir=Path(folder) / "state") as cluster:
            cluster.wait_serving(options.ranks)
            workload = Workload(cluster.url, cluster.model_name())
            workload.start()
            try:
                for number in range(options.rounds * len(names)):
                    turn, at = divmod(number, len(names))
                    name = names[(at + turn) % len(names)]
                    measured = trial(cluster, options.ranks, number % options.ranks, SETTINGS[name], options.pace_s)
                    found[name].append(measured)
            finally:
                workload.stop()
    print_table(found, names[0])


def print_table(found: dict[str, list[dict[str, float]]], base: str) -> None:
    """Medians with the best and the worst; the pace also against the first setting's of the same round."""
    for name, trials in found.items():
        cells = []
        for column in ("noticed", "masking", "masked", "recovered", "tokens/s"):
            values = sorted(trial[column] for trial in trials)
            cells.append(f"{column} {statistics.median(values):7.2f} ({values[0]:.2f}..{values[-1]:.2f})")
        ratios = [mine["tokens/s"] / its["tokens/s"] for mine, its in zip(trials, found[base], strict=True)]
        sooner = sum(mine["masked"] < its["masked"] for mine, its in zip(trials, found[base], strict=True))
        cells.append(f"pace / {base}'s {statistics.median(ratios):.3f}  masked sooner in {sooner} of {len(trials)}")
        sys.stdout.write(f"{name:8} {'  '.join(cells)}\n")


if __name__ == "__main__":
    main()
