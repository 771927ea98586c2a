"""The kill-rank scenario: stream, scale up, kill a rank, wait for the repair, scale back; then judge what clients saw.

The demo and the end-to-end tests run this very code. Every number of its receipt is measured: by the clients (gaps),
by the cluster's own event history (detection, recovery, epochs) or by the injector (when the process was gone).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from chaos.faults import Killed, kill
from chaos.target.cluster import ServedCluster
from chaos.workload.history import RequestRecord, Verdict, compare, percentile
from chaos.workload.streams import Workload
from membership.base.errors import WaitTimeout
from membership.base.events import Event
from membership.store.records import Operation

Tell = Callable[[str], None]


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the run proved. `ok` is False if a promise broke; `broken` says which."""

    ok: bool
    seed: int
    requests: int
    lost: int
    duplicated: int
    altered: int
    detected_ms: float
    recovered_ms: float
    max_token_gap_ms: float
    steady_token_gap_p99_ms: float
    scale_pause_ms: float
    restored_ms: float
    epochs: tuple[int, ...]
    broken: tuple[str, ...] = ()


@dataclass
class Run:
    """What a scenario has gathered so far; the view reads it while the scenario goes on."""

    seed: int
    oracle: dict[int, RequestRecord] = field(default_factory=dict)
    history: list[RequestRecord] = field(default_factory=list)
    scales: list[Operation] = field(default_factory=list)
    victim: int = -1  # the rank that was killed
    killed: Killed | None = None
    restored_at: float = 0.0
    workload: Workload | None = None


def kill_rank(cluster: ServedCluster, *, ranks: int, seed: int, seconds: float, tell: Tell, run: Run) -> None:
    """Oracle first, then the same prompts in a loop while the cluster goes `ranks` -> +2 -> a kill -> `ranks`."""
    chooser = random.Random(seed)
    tell(f"waiting for {ranks} ranks")
    cluster.wait_serving(ranks, tell=tell)
    model = cluster.model_name()

    tell("fault-free run of every prompt (the oracle)")
    oracle = Workload(cluster.url, model, seed=seed)
    run.workload = oracle
    run.oracle = {record.prompt: record for record in oracle.run_once()}

    tell("streaming")
    run.workload = workload = Workload(cluster.url, model, seed=seed)
    started = time.monotonic()
    workload.start()
    try:
        _until_tokens(workload, at_least=workload.concurrency)
        tell(f"scale {ranks} -> {ranks + 2} while they stream")
        run.scales.append(cluster.scale(ranks + 2))
        status = cluster.wait_serving(ranks + 2)
        victim = chooser.choice(status["ranks"])
        _until_tokens(workload, at_least=1)
        tell(f"kill -9 rank {victim['rank']} (pid {victim['pid']})")
        run.victim, run.killed = victim["rank"], kill(victim["pid"])
        _wait_new_incarnation(cluster, victim, ranks + 2, tell)
        run.restored_at = time.time()
        tell(f"scale {ranks + 2} -> {ranks}")
        run.scales.append(cluster.scale(ranks))
        cluster.wait_serving(ranks)
        while time.monotonic() - started < seconds:
            time.sleep(0.1)
    finally:
        run.history = workload.stop()


def receipt(run: Run, events: Sequence[Event]) -> Receipt:
    """Judge a finished run. Pure."""
    verdict = compare(run.history, run.oracle)
    sent_at = run.killed.sent_at if run.killed else 0.0
    steady = [gap for record in run.oracle.values() for gap in record.gaps_ms()]
    committed = [e.epoch for e in events if e.kind == "epoch_committed"]
    # A controller that dies between its commit and its event tells nobody: then the engine's event is the proof.
    epochs = tuple(sorted({*committed, *(e.epoch for e in events if e.kind == "epoch_adopted")}))
    detected_ms, recovered_ms = (_since_kill(run, events, kind) for kind in ("rank_masked", "rank_recovered"))
    broken = _broken_promises(run, verdict)
    rising = committed == sorted(set(committed))
    if not committed or not rising or epochs != tuple(range(epochs[0], epochs[0] + len(epochs))):
        broken.append(f"epochs do not rise by exactly 1: {list(epochs)}")
    if min(detected_ms, recovered_ms) < 0:
        broken.append(f"the engine did not notice the death of rank {run.victim}, or did not recover from it")
    return Receipt(
        ok=not broken,
        seed=run.seed,
        requests=verdict.requests,
        lost=verdict.count("lost"),
        duplicated=verdict.count("duplicated"),
        altered=verdict.count("altered"),
        detected_ms=detected_ms,
        recovered_ms=recovered_ms,
        max_token_gap_ms=round(max((g for r in run.history for g in r.gaps_ms()), default=0.0), 1),
        steady_token_gap_p99_ms=round(percentile(steady, 0.99), 1),
        scale_pause_ms=round(max((op.pause_ms for op in run.scales), default=0.0), 1),
        restored_ms=round((run.restored_at - sent_at) * 1000.0, 1) if run.restored_at else -1.0,
        epochs=epochs,
        broken=tuple(broken),
    )


def _broken_promises(run: Run, verdict: Verdict) -> list[str]:
    broken = [f"request {d.prompt} {d.kind}: {d.explanation}" for d in verdict.differences[:5]]
    if not verdict.requests:
        broken.append("no request was compared")
    broken += [f"the fault-free run of prompt {p} failed: {r.error}" for p, r in run.oracle.items() if not r.complete]
    if run.killed is None:
        broken.append("no rank was killed")
    if not run.restored_at:
        broken.append("the cluster did not come back to full strength")
    return broken


def _since_kill(run: Run, events: Sequence[Event], kind: str) -> float:
    """Milliseconds from the kill to the first such event about the victim; -1 if it never came."""
    if run.killed is None:
        return -1.0
    sent_at = run.killed.sent_at
    found = (e.ts for e in events if e.kind == kind and e.rank == run.victim and e.ts >= sent_at)
    return next((round((ts - sent_at) * 1000.0, 2) for ts in found), -1.0)


def _until_tokens(workload: Workload, at_least: int, timeout_s: float = 60.0) -> None:
    """Wait until that many streams have tokens and are in the middle of a request."""
    deadline = time.monotonic() + timeout_s
    while sum(count > 0 for count in workload.open_streams().values()) < at_least:
        if time.monotonic() > deadline:
            raise WaitTimeout(f"not {at_least} streams under way within {timeout_s} s: {workload.open_streams()}")
        time.sleep(0.005)


def _wait_new_incarnation(cluster: ServedCluster, victim: dict[str, object], ranks: int, tell: Tell) -> None:
    """Until the victim's slot serves again with another incarnation."""
    deadline = time.monotonic() + 90.0
    while True:
        status = cluster.wait_serving(ranks, tell=tell)
        again = next(r for r in status["ranks"] if r["rank"] == victim["rank"])
        if again["incarnation"] != victim["incarnation"]:
            return
        if time.monotonic() > deadline:
            raise WaitTimeout(f"rank {victim['rank']} did not come back as a new incarnation")
        time.sleep(0.02)
