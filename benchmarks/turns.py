"""How soon a watcher knows of a kill -9 while other processes want all cores, with and without short turns for it.

A victim that computes must first get a core to die on; one that sleeps is let in when the signal wakes it. So the two
kinds separate the victim's share of the delay from the watcher's. `python -m benchmarks.turns [--rounds 24]`.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict

from benchmarks.detection import schedule
from workers.ipc.cpu_priority import SLICE_US
from workers.protocol.liveness import DeathWatcher, LivenessPage

VICTIM = """
import sys, time
from workers.protocol.liveness import LivenessPage
page = LivenessPage.create()
print(page.handle().hex(), flush=True)
while sys.argv[1] == "computes":
    pass
time.sleep(100)
"""


def notice_ms(victim: str, slice_us: int) -> float:
    """From the signal until the watcher's callback."""
    child = subprocess.Popen(
        [sys.executable, "-c", VICTIM, victim], stdout=subprocess.PIPE, start_new_session=True, encoding="utf-8"
    )
    noticed, seen = threading.Event(), list[float]()

    def on_death(source: str) -> None:
        seen.append(time.monotonic())
        noticed.set()

    with child, LivenessPage.attach(bytes.fromhex(child.stdout.readline() if child.stdout else ""), 20.0) as page:
        schedule(os.getpid(), slice_us=slice_us)
        watcher = DeathWatcher(page, on_death)
        time.sleep(0.05 + 0.03 * random.random())
        sent = time.monotonic()
        child.kill()
        noticed.wait(20.0)
        watcher.stop()
    return (seen[0] - sent) * 1000


def main() -> None:
    """Keep all cores busy, kill victims in turn, print one line per kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=24)
    rounds = parser.parse_args().rounds
    burn = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # it ends with us
    busy = [
        subprocess.Popen([sys.executable, "-c", burn], start_new_session=True) for _ in range(2 * (os.cpu_count() or 1))
    ]
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    try:
        for _ in range(rounds):
            for victim in ("computes", "sleeps"):
                for slice_us in (0, SLICE_US):
                    found[victim, slice_us].append(notice_ms(victim, slice_us))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    for (victim, slice_us), taken in found.items():
        turns = f"turns of {slice_us} us" if slice_us else "default turns"
        p90 = sorted(taken)[int(len(taken) * 0.9)]
        line = f"victim {victim}, watcher with {turns}: median {statistics.median(taken):.2f} ms, p90 {p90:.2f} ms"
        sys.stdout.write(f"{line}, max {max(taken):.2f} ms\n")


if __name__ == "__main__":
    main()
