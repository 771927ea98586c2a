"""The soak: hundreds of faults at random moments under load, many of them nested.

Ranks and other roles are killed, ranks are stopped until they are given up and then wake as zombies, etcd freezes or is
started again. Each fault is proven by its injector; one that was not seen to happen does not count.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import msgspec

from chaos.campaigns.bursts import Burst, Quota, bursts
from chaos.campaigns.endurance import Endurance, EnduranceReceipt
from chaos.faults.base import Injected, NotInjected
from chaos.faults.catalogue import injector
from chaos.faults.signals import kill
from chaos.scenarios.victims import holders
from chaos.target.waiting import LIMIT_S, until
from chaos.workload.history import percentile
from chaos.workload.streams import PREAMBLE, PROMPTS, Load, Workload
from elastic.cli.client import wait_for
from membership.base.errors import ElasticError
from membership.operations.change import scale
from membership.store.records import ClusterState, RankRecord, View

# Slots die often, on purpose. KV blocks are so few that cached ones have to make room.
FLAGS = ("--restart-intensity", "1000", "--restart-window", "1s", "--kv-blocks", "64")
LENGTHS = (2, 1, 2, 3, 1, 2, 1, 3, 2, 1, 2, 40)  # of answers: many requests, and some that outlast several faults
LOAD = Load(streams=24, prompts=len(PROMPTS), lengths=LENGTHS, preamble=PREAMBLE)
WHOLE_S = 120.0


class SoakReceipt(EnduranceReceipt, frozen=True, kw_only=True):
    """What the soak proved. All faults that are counted were seen to happen."""

    kills: int
    zombies: int
    outages: int
    roles: int
    strikes: dict[str, int]  # bursts of each kind
    non_2xx: int
    restored_p50_ms: float
    restored_max_ms: float


@dataclass(kw_only=True)
class Soak(Endurance):
    """Bursts of faults until the quota is used up, or the minutes are over."""

    unit = "kills"

    quota: Quota
    load: Load = LOAD
    minutes: float = 0.0  # 0: until the quota is used up
    injected: list[Injected] = field(default_factory=list)
    bursts: Counter[str] = field(default_factory=Counter)
    restored_ms: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Ranks killed."""
        return self.count("kills")

    def count(self, group: str) -> int:
        """How many faults of a group (a field of Quota) were injected."""
        return sum(_group(fault) == group for fault in self.injected)

    def act(self, workload: Workload) -> None:
        """Burst after burst, each followed by full strength."""
        end = time.monotonic() + 60 * self.minutes
        for burst in bursts(self.seed, self.quota, self.ranks):
            if time.monotonic() > end if self.minutes else not self.missing(len(workload.records())):
                break
            self.restored_ms.append(_Injection(self, burst).inject())
            self.bursts[burst.kind] += 1
            if burst.kind != "role":
                self.look(self.quota.kills)
            if not self.minutes:
                self._keep_pace(workload)
            counts = ", ".join(f"{self.count(group)} {group}" for group in ("kills", "zombies", "outages"))
            self.notify(f"{counts}; {burst.kind}: whole again after {self.restored_ms[-1]:.0f} ms; "
                      f"{len(workload.records())} requests ended")  # fmt: skip

    def _keep_pace(self, workload: Workload) -> None:
        """Requests and kills end together: more kills in the meantime would be more than was asked for."""
        wanted = min(1.0, self.done / self.quota.kills) * self.quota.requests
        until(lambda: len(workload.records()) >= wanted, "requests to keep up with the kills")

    def after(self) -> None:
        """Note the leaks, and whether the cluster always came back."""
        super().after()
        others = f"{self.count('roles')} roles killed, {self.count('outages')} outages of etcd"
        self.verify("G6", self.troubles, f"{others}: full strength each time")
        self.verify_strength(self.restored_ms)

    def missing(self, requests: int) -> list[str]:
        """What of the quota is not done yet, given how many requests have ended."""
        had = {group: self.count(group) for group in ("kills", "zombies", "outages", "roles")} | {"requests": requests}
        wanted: dict[str, int] = msgspec.structs.asdict(self.quota)
        return [f"{had[name]} {name} instead of {number}" for name, number in wanted.items() if had[name] < number]

    def receipt(self) -> SoakReceipt:
        """Check the finished run. Pure."""
        broken = self.broken()
        if not self.minutes:
            broken += self.missing(len(self.history))
        broken += self.refusals()
        return SoakReceipt(
            **self.long_receipt(broken),
            kills=self.count("kills"),
            zombies=self.count("zombies"),
            outages=self.count("outages"),
            roles=self.count("roles"),
            strikes=dict(self.bursts),
            non_2xx=self.refused,
            restored_p50_ms=round(percentile(self.restored_ms, 0.5), 1),
            restored_max_ms=round(max(self.restored_ms, default=0.0), 1),
        )


def _group(fault: Injected) -> str:
    if fault.victim == "etcd":
        return "outages"
    if fault.fault == "stop":
        return "zombies"
    return "kills" if fault.victim.startswith("rank") else "roles"


class _Injection:
    """Injects one burst. Each method named after a kind also says which incarnations must be replaced."""

    def __init__(self, soak: Soak, burst: Burst) -> None:
        self.soak, self.burst = soak, burst
        self.cluster, self.site = soak.cluster, soak.target.site
        self.dead: dict[int, int] = {}  # rank -> incarnation that has to be followed by another one

    def inject(self) -> float:
        """Inject it, then wait until every slot serves again, the victims' with a new incarnation; how long, in ms."""
        time.sleep(self.burst.pause_s)
        self.before = until(lambda: _members(self._state(), self.soak.ranks), "a full view, with a record of each rank")
        self.victims = self.burst.victims(self.before)
        began = time.monotonic()
        getattr(self, f"_{self.burst.kind}", self._deaths)()
        until(self._whole, f"{self.soak.ranks} ranks to serve, with others for {sorted(self.dead)}", WHOLE_S)
        return (time.monotonic() - began) * 1000

    def _whole(self) -> bool:
        status = self.cluster.wait_serving(self.soak.ranks, timeout_s=WHOLE_S)
        return all(each["incarnation"] > self.dead.get(each["rank"], -1) for each in status["ranks"])

    def _state(self) -> ClusterState:
        return self.cluster.client().state()

    # --- kinds of bursts

    def _deaths(self) -> None:
        """One rank after the other."""
        for number, rank in enumerate(self.victims):
            if number and self.burst.kind == "commit":
                self._wait_staged(self.before[self.victims[0]])
            if number and self.burst.delay_s:
                time.sleep(self.burst.delay_s)
            self._kill_rank(self.before[rank])

    def _wait_staged(self, victim: RankRecord) -> None:
        until(lambda: _staged(self._state(), victim), f"a view with a successor of rank {victim.rank}")

    def _holders(self) -> None:
        view = self._state().view
        for rank in holders(view.placement, self.burst.chance) if view is not None else ():
            self._kill_rank(self.before[rank])

    def _newcomer(self) -> None:
        """The successor of a rank dies, too: while it handshakes, loads, or has just been committed."""
        self._deaths()
        victim = self.before[self.victims[0]]
        newcomer = until(lambda: _successor(self._state(), victim), f"a successor of rank {victim.rank}")
        time.sleep(self.burst.delay_s)
        with suppress(ElasticError):  # it may fail by itself meanwhile; only a proven kill counts
            self._kill_rank(newcomer)

    def _scale(self) -> None:
        """A rank dies while one more is on its way; the operation ends, one way or the other."""
        client, (rank,) = self.cluster.client(), self.victims
        growing = client.propose(scale(self.soak.ranks + 1), op_id=None, if_epoch=None, timeout_s=LIMIT_S)
        time.sleep(self.burst.delay_s)
        self._kill_rank(self.before[rank])
        for _ in wait_for(client, growing, 2 * LIMIT_S, threading.Event()):
            continue
        self.cluster.scale(self.soak.ranks)

    def _role(self) -> None:
        """The supervisor starts another one; an agent takes its ranks along."""
        self._kill(self.burst.role, self.site.pid(self.burst.role))
        if self.burst.role == "agent":
            self.dead |= {rank: record.incarnation for rank, record in self.before.items()}

    def _zombie(self) -> None:
        """Stopped until it is given up; awake again, it must find itself evicted and end."""
        (rank,) = self.victims
        stop = injector("stop", self.site, f"rank {rank}")
        stopped = stop.inject()
        try:
            self.dead[rank] = self.before[rank].incarnation
            until(lambda: _given_up(self._state(), self.before[rank]), f"rank {rank} to be given up")
            time.sleep(self.burst.delay_s)
        finally:
            with suppress(NotInjected):  # its agent was faster, and has ended it: no zombie, and not counted
                stop.heal()
                self._note(stopped)
                self.soak.note_healed(stopped)

    def _freeze(self) -> None:
        """etcd answers nothing for a while; ranks that die meanwhile are masked, and replaced afterwards."""
        with self._outage("stop"):
            end = time.monotonic() + self.burst.delay_s
            for rank in self.victims:
                self._kill_rank(self.before[rank])
            time.sleep(max(0.0, end - time.monotonic()))

    def _restart(self) -> None:
        with self._outage("etcd-down"):
            pass

    # --- faults

    @contextmanager
    def _outage(self, fault: str) -> Iterator[None]:
        """A fault of etcd for the length of the block."""
        outage = injector(fault, self.site, "etcd")
        injected = outage.inject()
        self._note(injected)
        try:
            yield
        finally:
            outage.heal()
            self.soak.note_healed(injected)

    def _kill_rank(self, record: RankRecord) -> None:
        self._kill(f"rank {record.rank}", record.pid)
        self.dead[record.rank] = record.incarnation

    def _kill(self, victim: str, pid: int) -> None:
        killed = kill(pid)
        proof = "its pidfd is readable: it is gone"
        self._note(Injected(
            fault="kill", victim=victim, at=killed.sent_at, seen_at=killed.gone_at, pid=pid, proof=proof,
        ))  # fmt: skip

    def _note(self, fault: Injected) -> None:
        self.soak.injected.append(fault)
        self.soak.note(fault)


# --- what is waited for, seen in one state of the store


def _members(state: ClusterState, ranks: int) -> dict[int, RankRecord] | None:
    """The record of each rank in the view of so many; None while one has none (leases run out while etcd is away)."""
    members = state.view.members if state.view is not None else ()
    found = {member.rank: state.ranks.get(member.id) for member in members}
    whole = {rank: record for rank, record in found.items() if record is not None}
    return whole if len(whole) == len(found) == ranks else None


def _successor(state: ClusterState, victim: RankRecord) -> RankRecord | None:
    """A later incarnation of the victim, once it has a process."""
    later = (r for r in state.ranks.values() if r.rank == victim.rank and r.incarnation > victim.incarnation and r.pid)
    return next(later, None)


def _staged(state: ClusterState, victim: RankRecord) -> bool:
    """Whether a view with the victim's successor is staged, or, if that was too quick to be seen, committed."""

    def has_successor(view: View | None) -> bool:
        member = view.member(victim.rank) if view is not None else None
        return member is not None and member.incarnation > victim.incarnation

    return has_successor(state.next) or has_successor(state.view)


def _given_up(state: ClusterState, victim: RankRecord) -> bool:
    """Whether this incarnation is out of the view, or masked: a mask in an older view was of its predecessor."""
    view, status = state.view, state.engine_status
    member = view.member(victim.rank) if view is not None else None
    if view is None or member is None or member.incarnation != victim.incarnation:
        return True
    return status is not None and status.epoch == view.epoch and victim.rank in status.masked
