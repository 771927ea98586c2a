"""The soak: hundreds of SIGKILLs of random ranks at random moments under load, many of them nested, then judgement.

Each kill is proven by the injector. Streams run all the while and are held against a fault-free run; the processes
that live on are watched for what they hold. Everything random comes from the seed (the cluster's own timing does not).
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from chaos.cluster import ServedCluster
from chaos.footprint import Footprint, Growth, growth, look, processes
from chaos.history import RequestRecord, Verdict, compare
from chaos.inject import Killed, kill
from chaos.strikes import Strike, holders, strikes
from chaos.workload import Workload
from membership.errors import ElasticError, WaitTimeout
from membership.types import RankRecord

Tell = Callable[[str], None]
LOOK_EVERY = 20  # kills
WARM_UP = 0.2  # of the kills: caches and allocators fill up
SLOPE_MB = 1.0  # per 100 kills
SLOPE_KILLS = 100  # of fewer kills a slope says nothing
SLACK = 8  # open files and threads that may come and go
POLL_S = 0.01
OURS = ("supervisor", "controller", "agent", "engine", "gateway", "forkserver")  # etcd's memory is its own affair
FLAGS = ("--restart-intensity", "1000", "--restart-window", "1s")  # the soak means to go on; see restart.py


class SoakReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the soak proved; `broken` says which promises broke."""

    ok: bool
    seed: int
    kills: int
    strikes: dict[str, int]
    requests: int
    tokens: int
    lost: int
    duplicated: int
    altered: int
    seconds: float
    restored_p50_ms: float
    restored_max_ms: float
    epochs: int
    processes: tuple[int, int]
    growth: tuple[Growth, ...]
    broken: tuple[str, ...] = ()


@dataclass
class Soak:
    """What a soak has gathered so far."""

    seed: int
    ranks: int
    killed: list[Killed] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    restored_ms: list[float] = field(default_factory=list)
    looks: list[tuple[int, dict[str, Footprint]]] = field(default_factory=list)
    oracle: dict[int, RequestRecord] = field(default_factory=dict)
    history: list[RequestRecord] = field(default_factory=list)
    processes: tuple[int, int] = (0, 0)
    shm: tuple[int, int] = (0, 0)
    epochs: int = 0
    seconds: float = 0.0


def run_soak(cluster: ServedCluster, soak: Soak, kills: int, streams: int, tell: Tell) -> None:
    """Oracle, streams, strikes until there were `kills` kills, full strength at the end."""
    cluster.wait_serving(soak.ranks, tell=tell)
    tell("fault-free run of every prompt (the oracle)")
    workload = Workload(cluster.url, cluster.model_name(), seed=soak.seed)
    soak.oracle = {record.prompt: record for record in workload.run_once()}
    before, shm, epoch = processes(cluster.pid), _shm(), cluster.status()["epoch"]
    workload = Workload(cluster.url, cluster.model_name(), concurrency=streams, seed=soak.seed)
    started = time.monotonic()
    workload.start()
    try:
        for strike in strikes(soak.seed, kills, soak.ranks):
            _strike(cluster, soak, strike)
            _look(cluster, soak, kills)
            tell(f"{len(soak.killed)}/{kills} kills, {strike.kind}: whole again after {soak.restored_ms[-1]:.0f} ms; "
                 f"{len(workload.records())} requests ended")  # fmt: skip
    finally:
        soak.history = workload.stop()
        soak.seconds = time.monotonic() - started
    cluster.wait_serving(soak.ranks)
    soak.epochs = cluster.status()["epoch"] - epoch
    soak.processes = (before, _settled(cluster, before))
    soak.shm = (shm, _shm())


def judge(soak: Soak, kills: int) -> SoakReceipt:
    """Judge a finished soak. Pure."""
    verdict = compare(soak.history, soak.oracle)
    grown = growth(soak.looks)
    restored = sorted(soak.restored_ms)
    broken = broken_promises(soak, verdict, grown, kills)
    return SoakReceipt(
        ok=not broken,
        seed=soak.seed,
        kills=len(soak.killed),
        strikes=dict(soak.done),
        requests=verdict.requests,
        tokens=sum(len(record.tokens) for record in soak.history),
        lost=verdict.count("lost"),
        duplicated=verdict.count("duplicated"),
        altered=verdict.count("altered"),
        seconds=round(soak.seconds, 1),
        restored_p50_ms=round(restored[len(restored) // 2], 1) if restored else 0.0,
        restored_max_ms=round(restored[-1], 1) if restored else 0.0,
        epochs=soak.epochs,
        processes=soak.processes,
        growth=grown,
        broken=tuple(broken),
    )


def broken_promises(soak: Soak, verdict: Verdict, grown: Sequence[Growth], kills: int) -> list[str]:
    """What did not hold, a line each."""
    broken = [f"request {d.prompt} {d.kind}: {d.explanation}" for d in verdict.differences[:10]]
    broken += [f"the fault-free run of prompt {p} failed: {r.error}" for p, r in soak.oracle.items() if not r.complete]
    if not verdict.requests:
        broken.append("no request was compared")
    if len(soak.killed) < kills:
        broken.append(f"{len(soak.killed)} kills instead of {kills}")
    if soak.processes[1] > soak.processes[0]:
        broken.append(f"{soak.processes[0]} processes before, {soak.processes[1]} after")
    if soak.shm[1] > soak.shm[0]:
        broken.append(f"{soak.shm[0]} files in /dev/shm before, {soak.shm[1]} after")
    for each in grown:
        if not each.process.startswith(OURS):
            continue
        if kills >= SLOPE_KILLS and each.rss_mb_per_100_kills > SLOPE_MB:
            broken.append(f"memory of {each.process} grows by {each.rss_mb_per_100_kills} MB per 100 kills")
        for what, (first, last) in (("open files", each.files), ("threads", each.threads)):
            if last > first + SLACK:
                broken.append(f"{what} of {each.process}: {first} at first, {last} at last")
    return broken


def _strike(cluster: ServedCluster, soak: Soak, strike: Strike) -> None:
    """Kill as the strike says, then wait until every slot serves again with a new incarnation."""
    time.sleep(strike.pause_s)
    before = _serving(cluster)
    victims = strike.ranks
    if strike.kind == "holders":
        view = cluster.client().state().view
        victims = holders(view.placement, strike.chance) if view is not None else ()
    began = time.monotonic()
    for number, rank in enumerate(victims):
        if number and strike.kind == "commit":
            _wait_staged(cluster, before[victims[0]])
        if number and strike.delay_s:
            time.sleep(strike.delay_s)
        soak.killed.append(kill(before[rank].pid))
    if strike.kind == "newcomer":
        newcomer = _newcomer(cluster, before[victims[0]], strike.delay_s)
        with suppress(ElasticError):  # it may fail by itself meanwhile; only a proven kill counts
            soak.killed.append(kill(newcomer.pid))
            before[victims[0]] = newcomer
    soak.done[strike.kind] += 1
    _wait_whole(cluster, soak.ranks, {rank: before[rank].incarnation for rank in victims})
    soak.restored_ms.append((time.monotonic() - began) * 1000)


def _serving(cluster: ServedCluster) -> dict[int, RankRecord]:
    """The records of the ranks in the view."""
    state = cluster.client().state()
    members = state.view.members if state.view is not None else ()
    return {member.rank: state.ranks[member.rank, member.incarnation] for member in members}


def _newcomer(cluster: ServedCluster, victim: RankRecord, delay_s: float, timeout_s: float = 60.0) -> RankRecord:
    """The victim's successor, `delay_s` after it was first seen: handshaking, loading, or just committed."""
    deadline = time.monotonic() + timeout_s
    while True:
        for (rank, incarnation), record in cluster.client().state().ranks.items():
            if rank == victim.rank and incarnation > victim.incarnation and record.pid:
                time.sleep(delay_s)
                return record
        if time.monotonic() > deadline:
            raise WaitTimeout(f"no successor of rank {victim.rank} within {timeout_s:.0f} s")
        time.sleep(POLL_S)


def _wait_staged(cluster: ServedCluster, victim: RankRecord, timeout_s: float = 60.0) -> None:
    """Until a view with the victim's successor is staged, or, if that was too quick to be seen, committed."""
    deadline = time.monotonic() + timeout_s
    while True:
        state = cluster.client().state()
        members = [view.member(victim.rank) for view in (state.next, state.view) if view is not None]
        if any(member is not None and member.incarnation > victim.incarnation for member in members):
            return
        if time.monotonic() > deadline:
            raise WaitTimeout(f"no view with a successor of rank {victim.rank} within {timeout_s:.0f} s")
        time.sleep(POLL_S)


def _wait_whole(cluster: ServedCluster, ranks: int, dead: dict[int, int], timeout_s: float = 120.0) -> None:
    """Until all slots serve, those of `dead` (rank -> incarnation) with a later incarnation."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = cluster.wait_serving(ranks, timeout_s=max(1.0, deadline - time.monotonic()))
        if all(each["incarnation"] > dead.get(each["rank"], -1) for each in status["ranks"]):
            return
        if time.monotonic() > deadline:
            raise WaitTimeout(f"not whole within {timeout_s:.0f} s of the deaths of ranks {sorted(dead)}")
        time.sleep(POLL_S)


def _look(cluster: ServedCluster, soak: Soak, kills: int) -> None:
    made = len(soak.killed)
    since = soak.looks[-1][0] if soak.looks else 0
    if made >= WARM_UP * kills and made - since >= min(LOOK_EVERY, kills / 10):
        soak.looks.append((made, look(cluster.pid)))


def _settled(cluster: ServedCluster, expected: int, timeout_s: float = 10.0) -> int:
    """The number of processes, once those that are ending have ended."""
    deadline = time.monotonic() + timeout_s
    while (count := processes(cluster.pid)) > expected and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return count


def _shm() -> int:
    return len(os.listdir("/dev/shm"))  # noqa: S108 - only looked at


def seed_of(given: int | None) -> int:
    """The seed that was asked for, or a fresh one."""
    return random.SystemRandom().randrange(100_000) if given is None else given
