"""What detection and masking cost while nothing fails: tokens/s with and without them, in paired windows (ABBA)."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.recovery_cluster import Scene, scene
from benchmarks.recovery_ranks import RANKS, STREAMS
from benchmarks.recovery_report import Report, say
from benchmarks.recovery_switch import SWITCH, Switch

WINDOW_S, SETTLE_S = 3.0, 0.6
Window = tuple[bool, float, float]


def windows(switch: Switch, count: int) -> list[Window]:
    """On, off, off, on, and so on: when each was, without the moments after a switch."""
    found = []
    for number in range(count):
        on = number % 4 in (0, 3)
        switch.turn(on=on)
        time.sleep(SETTLE_S)
        began = time.monotonic()
        time.sleep(WINDOW_S)
        found.append((on, began, time.monotonic()))
        say(f"window {number + 1} of {count}")
    switch.turn(on=True)
    return found


def pace(scene: Scene, window: Window) -> float:
    """Tokens per second that clients got."""
    _, began, ended = window
    return sum(began <= at < ended for r in scene.records for at in r.token_times) / (ended - began)


def row_cost(report: Report, kills: int, seed: int) -> None:
    """As many quadruples of windows as a third of the kills."""
    rounds = max(4, kills // 3)
    with tempfile.TemporaryDirectory(prefix="elastic-ep-switch-") as folder:
        switch = Switch.create(Path(folder) / "switch")
        with scene(RANKS, STREAMS, seed, steady_s=2.0, **{SWITCH: Path(folder) / "switch"}) as at:
            found = windows(switch, 4 * rounds)
            evicted = [e for e in at.history.events[: at.history.mark()] if e.kind in ("rank_masked", "rank_died")]
    ratios = []
    for number in range(rounds):
        quad = found[4 * number : 4 * number + 4]
        on = [pace(at, w) for w in quad if w[0]]
        off = [pace(at, w) for w in quad if not w[0]]
        ratios.append(sum(on) / sum(off))
        report.receipt("cost", round=number, on_tokens_s=on, off_tokens_s=off, ratio=ratios[-1])
    losses = sorted((1 - ratio) * 100 for ratio in ratios)
    report.add("cost with no fault: tokens/s lost to detection and masking", f"{STREAMS} streams", "<= 2 %", losses, 2,
               unit="%")  # fmt: skip
    quartiles = statistics.quantiles(losses, n=4)
    mean, error = statistics.fmean(losses), statistics.stdev(losses) / len(losses) ** 0.5
    said = f"quartiles {quartiles[0]:.2f}..{quartiles[2]:.2f} %, mean {mean:.2f} +- {error:.2f} %"
    report.note(f"cost: {rounds} paired rounds (on, off, off, on), {said}")
    report.ended("cost", at.verdict, evicted=len(evicted))
