"""What a failpoint costs where none is armed, and where one could be: ns per pass, per cent of a step."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

from membership.base import failpoints

CALLS = 200_000
ROUNDS = 7
PER_STEP = 1  # points that a rank passes in each step, and the engine as well
STEP_MS = 5.0  # of the demo model, two ranks on two cores; larger models take longer


def nothing(name: str, rank: int | None = None) -> None:
    """The least that any call costs."""


def ns_per_call(call: Callable[[], None]) -> float:
    """Median of some rounds."""
    return statistics.median(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e9


def armed_by_file(spec: str | None) -> float:
    """A pass where faults come from a file that says `spec` (None: there is none)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "failpoints"
        if spec is not None:
            failpoints.write(path, spec)
        environ = {**os.environ, failpoints.ENV: f"@{path}", failpoints.HISTORY_ENV: f"{folder}/events.jsonl"}
        failpoints.arm("rank", environ=environ)
        taken = ns_per_call(lambda: failpoints.hit("rank.step", 1))
        failpoints.arm("rank", environ={})
        return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, default=STEP_MS, help="what a step takes")
    step_ns = parser.parse_args().step_ms * 1e6
    passes = {
        "empty call": ns_per_call(lambda: nothing("rank.step", 1)),
        "off": ns_per_call(lambda: failpoints.hit("rank.step", 1)),
        "by file (--chaos), nothing armed": armed_by_file(""),
        "by file, something else armed": armed_by_file("rank.prepared@7=hang;engine.hello=1*kill"),
        "by file that is not there": armed_by_file(None),
    }
    print(f"median of {ROUNDS} x {CALLS} passes; per cent of a step of {step_ns / 1e6:g} ms, passed {PER_STEP} x in it")
    for what, ns in passes.items():
        print(f"{what:34} {ns:7.0f} ns  {100 * PER_STEP * ns / step_ns:.4f} %")


if __name__ == "__main__":
    main()
