"""What the message queue costs, beside multiprocessing.Pipe, ZeroMQ and a bare futex, all interleaved in one run.

    python -m benchmarks.mq [-o json] [--quick]

Compare within a run (ratios), not between runs: other load on the machine moves all of them together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mq_faults import measure_faults
from benchmarks.mq_transports import Fleet, Transport

KIB, MIB = 1024, 1024 * 1024


@dataclass
class Row:
    """One measure: what ours did, its target, and what the others did in the same run."""

    measure: str
    unit: str
    p50: float
    p99: float = 0.0
    target: float | None = None
    better: str = "lower"
    others: dict[str, float] = field(default_factory=dict)  # p50 of the others

    @property
    def ok(self) -> bool | None:
        """Whether the target holds."""
        if self.target is None:
            return None
        return self.p50 <= self.target if self.better == "lower" else self.p50 >= self.target


def percentile(samples: list[float], q: float) -> float:
    """Nearest rank."""
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * q))]


def round_trips(transport: Transport, message: Any, count: int, pause_s: float = 0.0) -> list[float]:
    """Microseconds from send to the last answer, `count` times."""
    found = []
    for _ in range(count):
        if pause_s:
            time.sleep(pause_s)
        start = time.perf_counter_ns()
        transport.send(message)
        transport.receive()
        found.append((time.perf_counter_ns() - start) / 1000)
    return found


def interleaved(fleet: Fleet, message: Any, rounds: int, count: int, pause_s: float = 0.0) -> dict[str, list[float]]:
    """Round trips of all transports that can carry the message, in turns."""
    able = [t for t in fleet.transports if t.carries or message is ANSWERABLE]
    found: dict[str, list[float]] = {t.name: [] for t in able}
    for _ in range(rounds):
        for transport in able:
            round_trips(transport, message, 2)
            found[transport.name] += round_trips(transport, message, count, pause_s)
    return found


ANSWERABLE = bytes(200)


def batch_of_a_scheduler() -> dict[str, Any]:
    """15 KB as a step's inputs are: ids, positions and block tables as arrays, and a few small fields."""
    return {
        "step": 17,
        "requests": [f"request-{n}" for n in range(8)],
        "tokens": np.arange(1250, dtype=np.int32),
        "positions": np.arange(1250, dtype=np.int32),
        "blocks": np.arange(1250, dtype=np.int32),
    }


def row(measure: str, samples: dict[str, list[float]], target: float | None, unit: str = "us", scale: float = 1) -> Row:
    """Ours against the others."""
    ours = samples["ours"]
    others = {name: percentile(s, 0.5) / scale for name, s in samples.items() if name != "ours"}
    return Row(measure, unit, percentile(ours, 0.5) / scale, percentile(ours, 0.99) / scale, target, others=others)


def cpu_ns(pids: list[int]) -> int:
    """CPU time of all threads of these processes so far."""
    return sum(
        int(Path(task, "schedstat").read_text(encoding="utf-8").split()[0])
        for pid in pids
        for task in Path(f"/proc/{pid}/task").iterdir()
    )


def cpu_percent(transport: Transport, run: Callable[[], Any]) -> float:
    """CPU of all peers together while `run` runs, in percent of one core."""
    pids = [peer.pid for peer in transport.peers]
    before, start = cpu_ns(pids), time.perf_counter_ns()
    run()
    return 100 * (cpu_ns(pids) - before) / (time.perf_counter_ns() - start)


def measure_paced(fleet: Fleet, seconds: float) -> Iterator[Row]:
    """One message per 10 ms: latency, and what the peers burn."""
    count = int(seconds / 0.01 / 4)
    samples: dict[str, list[float]] = {t.name: [] for t in fleet.transports}
    cpu: dict[str, list[float]] = {t.name: [] for t in fleet.transports}
    for _ in range(4):
        for t in fleet.transports:
            run = lambda t=t: samples[t.name].extend(round_trips(t, ANSWERABLE, count, 0.01))  # noqa: E731
            cpu[t.name].append(cpu_percent(t, run))
    yield row(f"one per 10 ms, {fleet.count} readers", samples, None)
    yield row(f"one per 10 ms, CPU of {fleet.count} readers", cpu, 8.0 if fleet.count == 8 else None, "% of a core")


def measure_idle(fleet: Fleet, seconds: float) -> Row:
    """CPU of waiting peers."""
    cpu = {t.name: [cpu_percent(t, lambda: time.sleep(seconds))] for t in fleet.transports}
    return row(f"idle CPU of {fleet.count} readers", cpu, 0.5, "% of a core")


def measure_late(fleet: Fleet, times: int) -> Row:
    """The first message after 1.3 s of silence, as a multiple of the bare futex's."""
    samples: dict[str, list[float]] = {t.name: [] for t in fleet.transports}
    for _ in range(times):
        for t in fleet.transports:
            samples[t.name] += round_trips(t, ANSWERABLE, 1, 1.3 / len(fleet.transports))
    found = row(f"wake after 1.3 s, {fleet.count} readers", samples, None)
    found.target = 1.3 * found.others["futex"]
    return found


def measure_fleet(count: int, few: int) -> Iterator[Row]:
    """All measures with `count` readers."""
    targets = {1: 10.0, 4: 40.0, 8: 120.0}
    with Fleet(count) as fleet:
        samples = interleaved(fleet, ANSWERABLE, 24 // few, 250)
        yield row(f"200 B round trip, {count} readers", samples, targets[count])
        yield measure_late(fleet, 16 // few)
        if count == 1:
            return
        yield from measure_paced(fleet, 4 / few)
        yield measure_idle(fleet, 2.0)
        if count == 8:
            batch = batch_of_a_scheduler()
            yield row("15 KB scheduler batch, 8 readers", interleaved(fleet, batch, 12 // few, 50), 400.0)
            one = np.zeros(MIB, np.uint8)
            yield row("1 MiB, 8 readers", interleaved(fleet, one, 8 // few, 10), 400.0)
            large = np.zeros(32 * MIB, np.uint8)
            yield row("32 MiB, 8 readers", interleaved(fleet, large, 4 // few + 1, 3), 25.0, "ms", 1000)


def measure(quick: bool, only: str) -> Iterator[Row]:
    """All measures, or only those with 1, 4 or 8 readers, or of faults."""
    few = 4 if quick else 1
    for count in (1, 4, 8):
        if only in ("", str(count)):
            yield from measure_fleet(count, few)
    if only in ("", "faults"):
        for name, value, unit, target, better in measure_faults(quick):
            yield Row(name, unit, value, 0.0, target, better)


def show(rows: list[Row]) -> str:
    """A table for people."""
    lines = [f"{'measure':42} {'p50':>9} {'p99':>9} {'target':>8}  {'':4} others' p50 (ours / theirs)"]
    for r in rows:
        target = "" if r.target is None else f"{r.target:.1f}"
        ok = {None: "", True: "ok", False: "MISS"}[r.ok]
        others = ", ".join(f"{k} {v:.1f} ({r.p50 / v:.2f})" if v else f"{k} {v:.1f}" for k, v in r.others.items())
        lines.append(f"{r.measure + ' [' + r.unit + ']':42} {r.p50:9.1f} {r.p99:9.1f} {target:>8}  {ok:4} {others}")
    return "\n".join(lines)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("", "1", "4", "8", "faults"), default="")
    options = parser.parse_args()
    rows = []
    load = os.getloadavg()[0]
    for found in measure(options.quick, options.only):
        rows.append(found)
        if options.output == "text":
            sys.stderr.write(f"{found.measure}: {found.p50:.1f} {found.unit}\n")
    if options.output == "json":
        machine = {"cores": os.cpu_count(), "load_before": load, "python": sys.version.split()[0]}
        print(json.dumps({"machine": machine, "rows": [asdict(r) | {"ok": r.ok} for r in rows]}))
    else:
        print(show(rows))


if __name__ == "__main__":
    main()
