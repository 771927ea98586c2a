"""Real processes that keep a step waiting, seen through /proc: who computes is left alone, who does nothing is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from threading import Event

from chaos.mutants.checks.promise import require
from membership.base.process_stats import threads
from membership.base.rank_id import RankId
from workers.fleet.watchdog import TICK_S, Look, Watchdog

WATCHED_S = 4.0
COMPUTES = """
import time
while True:
    until = time.thread_time() + 0.004
    while time.thread_time() < until: pass
    time.sleep(0.05)
"""
SLEEPS = "import time; time.sleep(60)"


def silent_ranks() -> None:
    """Three ranks do not answer a step: one computes, a little at a time; one is stopped; one hangs in a call."""
    ranks = [subprocess.Popen([sys.executable, "-S", "-c", code]) for code in (COMPUTES, SLEEPS, SLEEPS)]
    computes, stopped, hangs = (RankId(number, rank.pid) for number, rank in enumerate(ranks))
    pause = Event()
    try:
        pause.wait(0.5)  # they start
        os.kill(stopped[1], signal.SIGSTOP)
        watchdog, evicted = Watchdog(), dict[RankId, str]()
        began = time.monotonic()
        watchdog.began(1, (computes, stopped, hangs), began)
        while time.monotonic() < began + WATCHED_S and computes not in evicted:
            pause.wait(TICK_S)
            looks = {key: look for key in (computes, stopped, hangs) if (look := _look(key.incarnation)) is not None}
            evicted |= dict(watchdog.watch(looks, time.monotonic()))
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10.0)
    require(computes not in evicted, f"a rank that computes was evicted: {evicted.get(computes)}")
    require(evicted.get(stopped) == "stopped", f"a stopped rank was not found: {evicted}")
    require(evicted.get(hangs) == "hung", f"a rank that hangs was not found: {evicted}")


def _look(pid: int) -> Look | None:
    """As the engine looks at a rank, at a bad moment: when it sleeps, if it does so soon. It counts no beat and no turn
    (its pages are not there).
    """
    for _ in range(20):
        seen = threads(pid)
        if seen is None or seen.state != "R":
            break
        time.sleep(0.002)
    return None if seen is None else Look(seen.state, seen.main_s, seen.others_run, seen.all_s, turns=1)
