"""Does a machine at 100% CPU cost a rank its place? Serves under load beside processes that only burn CPU, and counts.

    python -m benchmarks.false_evictions [--minutes 10] [--hogs 4] [--ranks 4] [--streams 8] [--seed 0]

Every mask and every end of a rank counts, since no fault is injected here. Exit 1 if there was one, or if a request was
lost, duplicated or altered.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.recovery_cluster import scene
from benchmarks.recovery_report import say
from chaos.workload.history import percentile
from membership.base.events import Event

EVICTIONS = ("rank_masked", "rank_died", "rank_quarantined")
SAID_EVERY_S = 30.0


@contextmanager
def burning(hogs: int) -> Iterator[None]:
    """`count` processes that never sleep."""
    program = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # it ends with us
    running: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(hogs):
            running.append(subprocess.Popen([sys.executable, "-c", program]))
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait(timeout=10.0)


def evictions(events: list[Event]) -> list[Event]:
    """Those that cost a rank its place."""
    return [event for event in events if event.kind in EVICTIONS]


def main() -> None:
    """Serve for this time, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--hogs", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with scene(options.ranks, options.streams, options.seed, steady_s=0.0) as at, burning(options.hogs):
        began = time.monotonic()
        since = at.history.mark()
        while (left_s := began + options.minutes * 60 - time.monotonic()) > 0:
            time.sleep(min(SAID_EVERY_S, left_s))
            seen = at.history.events[since : at.history.mark()]
            say(f"{time.monotonic() - began:.0f} s: {len(evictions(seen))} evictions")
        ended = time.monotonic()
        seen = at.history.events[since : at.history.mark()]
    false = evictions(seen)
    for event in false:
        say(f"{event.kind} rank {event.rank}: {event.fields}")
    slow = sum(event.kind == "rank_slow" for event in seen)
    gaps = at.gaps(began, ended)
    p99_ms = percentile(gaps, 0.99) if gaps else 0.0
    sys.stdout.write(
        f"{options.minutes:g} minutes, {options.ranks} ranks, {options.streams} streams, {options.hogs} CPU hogs: "
        f"{len(false)} false evictions, {slow} flags of slow ranks; {at.verdict.requests} requests, "
        f"{len(at.verdict.differences)} not exact; token gap p99 {p99_ms:.0f} ms, "
        f"largest {max(gaps, default=0.0):.0f} ms\n"
    )
    sys.exit(1 if false or not at.verdict.ok or not gaps else 0)


if __name__ == "__main__":
    main()
