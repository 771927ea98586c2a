"""The soak: hundreds of SIGKILLs of random ranks at random moments under load, many of them nested, then judgement.

Each kill is proven by the injector.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from chaos.cluster import ServedCluster
from chaos.endurance import POLL_S, Endurance, Tell
from chaos.footprint import Growth
from chaos.inject import Killed, kill
from chaos.strikes import Strike, holders, strikes
from membership.errors import ElasticError, WaitTimeout
from membership.types import RankRecord

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


@dataclass(kw_only=True)
class Soak(Endurance):
    """What a soak has gathered so far."""

    ranks: int
    killed: list[Killed] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    restored_ms: list[float] = field(default_factory=list)


def run_soak(cluster: ServedCluster, soak: Soak, kills: int, streams: int, tell: Tell) -> None:
    """Strikes under load until there were `kills` kills, full strength at the end."""
    with soak.under_load(cluster, soak.ranks, streams, tell) as workload:
        for strike in strikes(soak.seed, kills, soak.ranks):
            _strike(cluster, soak, strike)
            soak.look(cluster, len(soak.killed), kills)
            tell(f"{len(soak.killed)}/{kills} kills, {strike.kind}: whole again after {soak.restored_ms[-1]:.0f} ms; "
                 f"{len(workload.records())} requests ended")  # fmt: skip


def judge(soak: Soak, kills: int) -> SoakReceipt:
    """Judge a finished soak. Pure."""
    verdict = soak.verdict()
    restored = sorted(soak.restored_ms)
    broken = soak.broken(kills, "kills")
    if len(soak.killed) < kills:
        broken.append(f"{len(soak.killed)} kills instead of {kills}")
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
        growth=soak.growth(),
        broken=tuple(broken),
    )


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
