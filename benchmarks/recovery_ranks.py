"""Rows of `recovery.py` that kill ranks: detection (against a bare robust futex), rows, gaps, full strength again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recovery_cluster import Scene, scene
from benchmarks.recovery_report import Report, say
from chaos.faults import kill
from membership.base.errors import ElasticError
from membership.base.events import Event
from workers.ipc.cpu_priority import run_in_short_turns
from workers.ipc.futex import RobustMutex
from workers.ipc.shared_memory import PAGE, Segment

BALLAST_MB = 2048
RANKS, STREAMS = 4, 8
FLOOR_VICTIM = """
import sys, time
from benchmarks.recovery_worker import ballast
from workers.ipc.futex import RobustMutex
from workers.ipc.shared_memory import PAGE, Segment
keep = ballast(int(sys.argv[2]))
segment = Segment.attach(int(sys.argv[1]), PAGE)
mutex = RobustMutex(segment.address)
mutex.initialise()
mutex.lock_now()
print("ready", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class Death:
    """One rank killed, up to full strength again. Times are seconds of the monotonic clock."""

    rank: int
    pid: int
    at: float
    gone_at: float
    noticed_at: float
    answered_at: float | None  # the last lost row; None: no row was lost
    recovered_at: float
    full_at: float
    source: str
    rows: int
    moved: frozenset[str]


def rss_mb(pid: int) -> float:
    """Resident memory."""
    fields = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def kill_rank(scene: Scene, rank: int, least_rss_mb: float = 0.0) -> Death:
    """SIGKILL a rank at a random moment, prove it, and wait for full strength."""
    history = scene.history
    pid = scene.pid_of(rank)
    if rss_mb(pid) < least_rss_mb:
        raise ElasticError(f"rank {rank} has {rss_mb(pid):.0f} MB, not {least_rss_mb:.0f}")
    scene.pause()
    mark = history.mark()
    killed = kill(pid)

    def of_victim(kind: str) -> Event:
        return history.wait(mark, f"{kind} of rank {rank}", lambda e: e.kind == kind and e.rank == rank)

    masked, recovered = of_victim("rank_masked"), of_victim("rank_recovered")
    exited = history.wait(
        mark, f"exit of process {pid}", lambda e: e.kind == "rank_exited" and e.fields.get("pid") == pid
    )
    if exited.fields.get("signal") != signal.SIGKILL:
        raise ElasticError(f"rank {rank} ended otherwise: {exited.fields}")
    full = history.wait_adopted(mark, scene.ranks, f"after the death of rank {rank}")
    retried = [e for e in history.events[mark:] if e.kind == "rows_retried" and e.ts <= recovered.ts]
    return Death(
        rank, pid, killed.at, killed.at + killed.gone_at - killed.sent_at, masked.fields["noticed_at"],
        max((e.fields["answered_at"] for e in retried), default=None), history.when(recovered), history.when(full),
        masked.fields["source"], sum(e.fields["rows"] for e in retried), frozenset(masked.fields["request_ids"]),
    )  # fmt: skip


@contextmanager
def floor_victim(megabytes: int) -> Any:
    """A process of this size that holds a robust mutex, and that mutex."""
    with Segment.create(PAGE, "recovery-floor") as segment:
        victim = subprocess.Popen(
            [sys.executable, "-c", FLOOR_VICTIM, str(segment.fileno()), str(megabytes)], stdout=subprocess.PIPE,
            pass_fds=[segment.fileno()], cwd=Path(__file__).parents[1],
        )  # fmt: skip
        try:
            yield victim, RobustMutex(segment.address)
        finally:
            victim.kill()
            victim.communicate(timeout=10)


def floor_ms(victim: subprocess.Popen[bytes], mutex: RobustMutex) -> float:
    """From SIGKILL until one thread of ours has the mutex: nothing else, no Python object in between."""
    if victim.stdout is None or victim.stdout.readline() != b"ready\n":
        raise ElasticError("the floor's victim did not start")
    if rss_mb(victim.pid) < BALLAST_MB:
        raise ElasticError("the floor's victim is too small")
    noticed_at: list[float] = []

    def wait() -> None:
        run_in_short_turns()  # as the engine does
        if mutex.owner_died(10.0):
            noticed_at.append(time.monotonic())

    watcher = threading.Thread(target=wait)
    watcher.start()
    time.sleep(0.1)
    sent_at = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    watcher.join(timeout=15.0)
    if not noticed_at:
        raise ElasticError("the floor's victim did not die")
    return (noticed_at[0] - sent_at) * 1000


def row_detect(report: Report, kills: int, seed: int) -> None:
    """SIGKILL of a rank with 2 GB until the engine knows, quiet and loaded, each beside the floor."""
    for streams, condition in ((1, "1 stream"), (STREAMS, f"{STREAMS} streams, {RANKS} ranks on all cores")):
        noticed, floors = [], []
        with scene(RANKS, streams, seed, steady_s=1.0, RECOVERY_BALLAST_MB=BALLAST_MB) as at:
            for number in range(kills):
                with floor_victim(BALLAST_MB) as (victim, mutex):
                    floors.append(floor_ms(victim, mutex))
                death = kill_rank(at, number % RANKS, BALLAST_MB)
                noticed.append((death.noticed_at - death.at) * 1000)
                gone_ms = (death.gone_at - death.at) * 1000
                report.receipt(
                    "detect", kill=number, rank=death.rank, pid=death.pid, streams=streams, signal=9,
                    detect_ms=noticed[-1], floor_ms=floors[-1], gone_ms=gone_ms, source=death.source,
                )  # fmt: skip
                say(f"detect {number}: {noticed[-1]:.2f} ms, floor {floors[-1]:.2f}, gone after {gone_ms:.1f}")
        report.add("SIGKILL of a rank with 2 GB RSS -> engine knows", condition, "1 / 10 ms", noticed, 2)
        report.add("floor: bare robust futex, 2 GB", condition, "0.25 ms", floors, 2)
        report.ended(f"detect, {condition}", at.verdict)


def row_kills(report: Report, kills: int, seed: int, flags: tuple[str, ...] = ()) -> None:
    """SIGKILL under load: rows answered, gaps of both kinds of requests, full strength."""
    with scene(RANKS, STREAMS, seed, flags=flags) as at:
        deaths = []
        for number in range(kills):
            spare = at.spare() if flags else 0
            deaths.append(death := kill_rank(at, number % RANKS))
            if spare and at.pid_of(death.rank) != spare:
                raise ElasticError(f"rank {death.rank} is back without the spare, process {spare}")
            say(f"kill {number}: rank {death.rank}, full after {(death.full_at - death.at) * 1000:.0f} ms")
    name = "kills with a spare" if flags else "kills"
    figures: list[dict[str, float | None]] = []
    for number, death in enumerate(deaths):
        figures.append(measured := felt(at, death))
        report.receipt(
            name, kill=number, rank=death.rank, pid=death.pid, signal=9, source=death.source, rows=death.rows,
            moved=len(death.moved), steady_p99_ms=at.steady_p99_ms(), **measured,
        )  # fmt: skip

    def column(key: str) -> list[float]:
        return [value for each in figures if (value := each[key]) is not None]

    load = f"{STREAMS} streams of 256 tokens"
    if flags:
        report.add("full strength again with a spare", load, "100 / 300 ms", column("full_ms"))
        report.ended(name, at.verdict)
        return
    report.add("SIGKILL -> engine knows (no ballast)", load, "1 / 10 ms", column("detect_ms"), 2)
    report.add("SIGKILL -> every lost row answered by a replica", load, "10 / 50 ms", column("rows_ms"))
    report.add("token gap of others beyond steady p99, until full strength", load, "30 / 100 ms", column("others_ms"))
    report.add("- of it, until the loss was made good", load, "", column("others_early_ms"))
    window_s = sum(death.full_at - death.at for death in deaths) / max(1, len(deaths))
    report.add("- the same without a kill (chance)", f"windows of {window_s:.2f} s", "", at.control(window_s))
    report.add("the same of requests that lived on it", load, "100 / 300 ms", column("own_ms"))
    report.add("full strength again from the forkserver", load, "250 / 800 ms", column("full_ms"))
    lost = sum(death.answered_at is not None for death in deaths)
    report.note(f"{name}: rows were lost in {lost} of {len(deaths)}; steady p99 of gaps {at.steady_p99_ms():.1f} ms")
    report.ended(name, at.verdict)


def felt(scene: Scene, death: Death) -> dict[str, float | None]:
    """The figures of one death, in milliseconds; None where there was nothing to feel it."""

    def own(request: str) -> bool:
        return f"{request}-0" in death.moved

    def others(request: str) -> bool:
        return not own(request)

    return {
        "detect_ms": (death.noticed_at - death.at) * 1000,
        "rows_ms": None if death.answered_at is None else (death.answered_at - death.at) * 1000,
        "others_ms": scene.beyond(scene.gaps(death.at, death.full_at, others)),
        "others_early_ms": scene.beyond(scene.gaps(death.at, death.recovered_at, others)),
        "own_ms": scene.beyond(scene.gaps(death.at, death.full_at, own)),
        "recovered_ms": (death.recovered_at - death.at) * 1000,
        "full_ms": (death.full_at - death.at) * 1000,
    }
