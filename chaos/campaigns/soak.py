"""The soak: hundreds of faults at random moments under load, many of them nested, then judgement.

Ranks and other roles are killed, ranks are stopped until they are given up and then wake as zombies, etcd freezes or is
started again. Each fault is proven by its injector; one that was not seen to happen does not count.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from chaos.campaigns.endurance import Endurance, Tell
from chaos.campaigns.strikes import Dose, Strike, holders, strikes
from chaos.faults import kill
from chaos.faults.base import Injected, NotInjected
from chaos.faults.catalogue import injector
from chaos.faults.site import ServedSite
from chaos.target import waiting
from chaos.target.cluster import ServedCluster
from chaos.target.footprint import Growth
from chaos.workload.streams import Workload
from elastic.cli.client import wait_for
from membership.base.errors import ElasticError
from membership.operations.change import scale
from membership.store.records import RankRecord

FLAGS = ("--restart-intensity", "1000", "--restart-window", "1s")  # the soak means to go on; see restart.py
LENGTHS = (2, 1, 2, 3, 1, 2, 1, 3, 2, 1, 2, 40)  # of answers: many requests, and some that live through several faults


class SoakReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the soak proved; `broken` says which promises broke. All faults that are counted were seen to happen."""

    ok: bool
    seed: int
    kills: int
    zombies: int
    outages: int
    roles: int
    strikes: dict[str, int]
    requests: int
    tokens: int
    lost: int
    duplicated: int
    altered: int
    non_2xx: int
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
    minutes: float = 0.0  # how long it goes on; 0: until the dose is dealt
    dealt: list[Injected] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    restored_ms: list[float] = field(default_factory=list)

    def count(self, group: str) -> int:
        """How many faults of a group (a field of Dose) were dealt."""
        return sum(_group(fault) == group for fault in self.dealt)


def _group(fault: Injected) -> str:
    if fault.victim == "etcd":
        return "outages"
    if fault.fault == "stop":
        return "zombies"
    return "kills" if fault.victim.startswith("rank") else "roles"


def run_soak(cluster: ServedCluster, soak: Soak, dose: Dose, streams: int, tell: Tell) -> None:
    """Strikes under load until the dose is dealt, or the minutes are over; full strength at the end."""
    with soak.under_load(cluster, soak.ranks, streams, tell, LENGTHS) as workload:
        until = time.monotonic() + 60 * soak.minutes
        for strike in strikes(soak.seed, dose, soak.ranks):
            if time.monotonic() > until if soak.minutes else not missing(soak, dose, workload):
                break
            _Blow(cluster, soak, strike).deal()
            if strike.kind != "role":
                soak.look(cluster, soak.count("kills"), dose.kills)
            if not soak.minutes:
                _keep_pace(soak, dose, workload)
            tell(f"{soak.count('kills')} kills, {soak.count('zombies')} zombies, {soak.count('outages')} outages; "
                 f"{strike.kind}: whole again after {soak.restored_ms[-1]:.0f} ms; "
                 f"{len(workload.records())} requests ended")  # fmt: skip
    soak.verify(soak.count("kills"), "kills")
    if soak.recorder is not None:
        others = f"{soak.count('roles')} roles killed, {soak.count('outages')} outages of etcd: full strength each time"
        soak.recorder.verified("G6", not soak.stuck, soak.stuck or others)
        longest_s = max(soak.restored_ms, default=0.0) / 1000
        waits = f"{len(soak.restored_ms)} waits for full strength, the longest {longest_s:.1f} s"
        soak.recorder.verified("G8", not soak.stuck, soak.stuck or waits)


def _keep_pace(soak: Soak, dose: Dose, workload: Workload) -> None:
    """Requests and kills come to their end together: to strike on meanwhile would deal more than was asked for."""
    share = min(1.0, soak.count("kills") / dose.kills)
    waiting.eventually(lambda: len(workload.records()) >= share * dose.requests, "requests to keep up with the kills")


def missing(soak: Soak, dose: Dose, workload: Workload | None = None) -> list[str]:
    """What of the dose is not dealt yet."""
    had = {group: soak.count(group) for group in ("kills", "zombies", "outages", "roles")}
    had["requests"] = len(workload.records() if workload is not None else soak.history)
    wanted: dict[str, int] = msgspec.structs.asdict(dose)
    return [f"{had[name]} {name} instead of {number}" for name, number in wanted.items() if had[name] < number]


def judge(soak: Soak, dose: Dose) -> SoakReceipt:
    """Judge a finished soak. Pure."""
    verdict = soak.verdict()
    restored = sorted(soak.restored_ms)
    broken = soak.broken(soak.count("kills"), "kills")
    if not soak.minutes:
        broken += missing(soak, dose)
    refused = sum(record.status != 200 for record in soak.history)
    if refused:
        broken.append(f"{refused} requests were refused, though every expert came back in time")
    return SoakReceipt(
        ok=not broken,
        seed=soak.seed,
        kills=soak.count("kills"),
        zombies=soak.count("zombies"),
        outages=soak.count("outages"),
        roles=soak.count("roles"),
        strikes=dict(soak.done),
        requests=verdict.requests,
        tokens=sum(len(record.tokens) for record in soak.history),
        lost=verdict.count("lost"),
        duplicated=verdict.count("duplicated"),
        altered=verdict.count("altered"),
        non_2xx=refused,
        seconds=round(soak.seconds, 1),
        restored_p50_ms=round(restored[len(restored) // 2], 1) if restored else 0.0,
        restored_max_ms=round(restored[-1], 1) if restored else 0.0,
        epochs=soak.epochs,
        processes=soak.processes,
        growth=soak.growth(),
        broken=tuple(broken),
    )


class _Blow:
    """One strike on its way: each method named after a kind deals it, and says which incarnations must be replaced."""

    def __init__(self, cluster: ServedCluster, soak: Soak, strike: Strike) -> None:
        self.cluster, self.soak, self.strike = cluster, soak, strike
        self.site = ServedSite(cluster)
        self.dead: dict[int, int] = {}  # rank -> incarnation that has to be followed by another one

    def deal(self) -> None:
        """Strike, then wait until every slot serves again, those that were struck with a new incarnation."""
        time.sleep(self.strike.pause_s)
        self.before = waiting.serving(self.cluster)
        began = time.monotonic()
        getattr(self, f"_{self.strike.kind}", self._deaths)()
        self.soak.done[self.strike.kind] += 1
        waiting.whole(self.cluster, self.soak.ranks, self.dead)
        self.soak.restored_ms.append((time.monotonic() - began) * 1000)

    def _kill(self, victim: str, pid: int) -> None:
        killed = kill(pid)
        self._note(Injected(
            fault="kill", victim=victim, at=killed.sent_at, seen_at=killed.gone_at, pid=pid,
            proof="its pidfd is readable: it is gone",
        ))  # fmt: skip

    def _note(self, fault: Injected) -> None:
        self.soak.dealt.append(fault)
        if self.soak.recorder is not None:
            self.soak.recorder.dealt(fault)

    def _healed(self, fault: Injected) -> None:
        if self.soak.recorder is not None:
            self.soak.recorder.healed(fault)

    def _kill_rank(self, record: RankRecord) -> None:
        self._kill(f"rank {record.rank}", record.pid)
        self.dead[record.rank] = record.incarnation

    def _deaths(self) -> None:
        """One rank after the other."""
        for number, rank in enumerate(self.strike.ranks):
            if number and self.strike.kind == "commit":
                waiting.staged(self.cluster, self.before[self.strike.ranks[0]])
            if number and self.strike.delay_s:
                time.sleep(self.strike.delay_s)
            self._kill_rank(self.before[rank])

    def _holders(self) -> None:
        view = self.cluster.client().state().view
        for rank in holders(view.placement, self.strike.chance) if view is not None else ():
            self._kill_rank(self.before[rank])

    def _newcomer(self) -> None:
        self._deaths()
        newcomer = waiting.successor(self.cluster, self.before[self.strike.ranks[0]], self.strike.delay_s)
        with suppress(ElasticError):  # it may fail by itself meanwhile; only a proven kill counts
            self._kill_rank(newcomer)

    def _scale(self) -> None:
        """A rank dies while one more is on its way; the operation ends, one way or the other."""
        client, (rank,) = self.cluster.client(), self.strike.ranks
        growing = client.propose(scale(self.soak.ranks + 1), op_id=None, if_epoch=None, timeout_s=waiting.LIMIT_S)
        time.sleep(self.strike.delay_s)
        self._kill_rank(self.before[rank])
        for _ in wait_for(client, growing, 2 * waiting.LIMIT_S, threading.Event()):
            continue
        self.cluster.scale(self.soak.ranks)

    def _role(self) -> None:
        """The supervisor starts another one; an agent takes its ranks along."""
        self._kill(self.strike.role, self.site.pid(self.strike.role))
        if self.strike.role == "agent":
            self.dead |= {rank: record.incarnation for rank, record in self.before.items()}

    def _zombie(self) -> None:
        """Stopped until it is given up; awake again, it must find itself evicted and end."""
        (rank,) = self.strike.ranks
        stop = injector("stop", self.site, f"rank {rank}")
        stopped = stop.inject()
        try:
            self.dead[rank] = self.before[rank].incarnation
            waiting.given_up(self.cluster, self.before[rank])
            time.sleep(self.strike.delay_s)
        finally:
            with suppress(NotInjected):  # its agent was faster, and has ended it: no zombie, and not counted
                stop.heal()
                self._note(stopped)
                self._healed(stopped)

    def _freeze(self) -> None:
        """etcd answers nobody for a while; who dies meanwhile is masked, and replaced afterwards."""
        stop = injector("stop", self.site, "etcd")
        frozen = stop.inject()
        self._note(frozen)
        try:
            until = time.monotonic() + self.strike.delay_s
            for rank in self.strike.ranks:
                self._kill_rank(self.before[rank])
            time.sleep(max(0.0, until - time.monotonic()))
        finally:
            stop.heal()
            self._healed(frozen)

    def _restart(self) -> None:
        restart = injector("etcd-down", self.site, "etcd")
        ended = restart.inject()
        self._note(ended)
        restart.heal()
        self._healed(ended)
