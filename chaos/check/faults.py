"""Each fault was proven, and what followed it: when it was noticed and recovered from, and how long tokens paused."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from chaos.check.evidence import Check, Evidence, typed
from chaos.record.record import InjectedFault
from chaos.workload.history import percentile
from membership.base.events import Event
from membership.store.records import RankExit, View

LETHAL = ("kill", "segv", "oom", "abort", "crash")  # faults with such names end the process
NOTICED_S = 60.0  # a death is in the membership by then
HEALED_S = 5.0  # first reported later than this after healing: another cause
AFTER_S = 5.0  # a pause that begins later after a fault has another cause
PAUSE_MS = 20.0  # shorter gaps are not counted

DIED = "role_died"
NOTICED = ("rank_masked", "rank_left", "rank_died", "rank_exited", DIED, "etcd_died")
IN_OFFICE = {"engine": "engine_elected", "controller": "leader_elected"}


class Aftermath(msgspec.Struct, frozen=True, kw_only=True):
    """What followed one fault, in milliseconds since its injection; -1: it did not happen, or had another cause."""

    fault: str
    victim: str
    at: float
    incarnation: int = 0
    noticed_ms: float = -1.0  # the first event about it in the cluster's history
    recovered_ms: float = -1.0  # its requests have tokens again; for a role: there is one in office again
    restored_ms: float = -1.0  # its slot serves again
    pause_ms: float = 0.0  # the longest wait of any stream for a token


class FaultsProven(Check):
    """Each fault has a proof, each death was noticed; figures of what followed."""

    title = "faults"

    def finish(self) -> None:
        followed, gone = aftermaths(self.evidence), _gone(self.evidence)
        for injected, after in zip(self.evidence.faults, followed, strict=True):
            self.judged += 1
            fault = injected.fault
            if not fault.proof or fault.seen_at < fault.at:
                self.found(f"{fault.fault} of {fault.victim} was counted without proof that it happened", injected)
            lethal = fault.fault.startswith(LETHAL) and after.incarnation
            if lethal and self.evidence.ended > fault.at + NOTICED_S and after.incarnation not in gone:
                what = f"{fault.fault} of {fault.victim} (incarnation {after.incarnation}) was never noticed"
                self.found(what, injected)
        self.figures["faults"] = len(followed)
        for name in ("noticed_ms", "recovered_ms", "restored_ms"):
            values = [value for after in followed if (value := getattr(after, name)) >= 0]
            if values:
                self.figures[name.replace("_ms", "_p50_ms")] = round(percentile(values, 0.5), 1)
                self.figures[name.replace("_ms", "_max_ms")] = round(max(values), 1)
        self.figures["pause_max_ms"] = round(max((after.pause_ms for after in followed), default=0.0), 1)


def aftermaths(evidence: Evidence) -> list[Aftermath]:
    """What followed each fault, in the order of `evidence.faults`."""
    events = _Index(evidence.events)
    processes, returns, pauses = _processes(evidence), _returns(evidence), _pauses(evidence)
    until = over(evidence.faults)
    found = []
    for number, injected in enumerate(evidence.faults):
        fault = injected.fault
        rank = int(fault.victim.split()[1]) if fault.victim.startswith("rank ") else None
        incarnation = processes.get(fault.pid, 0) if rank is not None else 0
        noticed = events.first(NOTICED, fault.at, rank, incarnation, fault.victim, fault.pid)
        if noticed is not None and noticed > until[number]:
            noticed = None
        if rank is not None:
            recovered = events.first(("rank_recovered",), fault.at, rank)
            back = returns.get(rank, [])
            after = bisect_right(back, (incarnation, float("inf"))) if incarnation else len(back)
            restored = back[after][1] if after < len(back) else None
        else:
            kind = IN_OFFICE.get(fault.victim, "role_started")
            recovered = events.first((kind,), fault.at, name="" if kind != "role_started" else fault.victim)
            restored = None
        found.append(
            Aftermath(
                fault=fault.fault, victim=fault.victim, at=fault.at, incarnation=incarnation,
                noticed_ms=_ms(fault.at, noticed), recovered_ms=_ms(fault.at, recovered),
                restored_ms=_ms(fault.at, restored), pause_ms=pauses[number],
            )
        )  # fmt: skip
    return found


def over(faults: Sequence[InjectedFault]) -> list[float]:
    """For each fault, by time, until when events are attributed to it: its healing, or the victim's next fault."""
    again: dict[str, float] = {}
    found = []
    for injected in reversed(faults):
        healed = injected.healed_at + HEALED_S if injected.healed_at else math.inf
        found.append(min(healed, again.get(injected.fault.victim, math.inf)))
        again[injected.fault.victim] = injected.fault.at
    return found[::-1]


def _ms(since: float, at: float | None) -> float:
    return -1.0 if at is None or at < since else round((at - since) * 1000.0, 3)


class _Index:
    """The events by kind and victim, to find the first one after a moment."""

    def __init__(self, events: list[Event]) -> None:
        self._events: dict[tuple[str, Any], list[Event]] = {}
        for event in events:
            subject = (
                event.rank if event.rank is not None else event.fields.get("pid" if event.kind == DIED else "name", "")
            )
            self._events.setdefault((event.kind, subject), []).append(event)

    def first(
        self,
        kinds: tuple[str, ...],
        since: float,
        rank: int | None = None,
        incarnation: int = 0,
        name: str = "",
        pid: int = 0,
    ) -> float | None:
        """When the first such event was. Two processes may be the engine in office: the pid says which one died."""
        times = []
        for kind in kinds:
            subject = rank if rank is not None else {DIED: pid, "etcd_died": ""}.get(kind, name)
            events = self._events.get((kind, subject), [])
            for event in events[bisect_left(events, since, key=lambda event: event.ts) :]:
                if not incarnation or event.fields.get("incarnation") == incarnation:
                    times.append(event.ts)
                    break
        return min(times, default=None)


def _processes(evidence: Evidence) -> dict[int, int]:
    """Process id -> the incarnation that ran as it. (A process id may be used again; the latest use counts.)"""
    return {int(put.value.get("pid", 0)): int(put.value["incarnation"]) for put in evidence.rank_records}


def _returns(evidence: Evidence) -> dict[int, list[tuple[int, float]]]:
    """Rank -> (incarnation, when the first view with it was committed), rising."""
    found: dict[int, dict[int, float]] = {}
    for revision in evidence.revisions:
        view = revision.put("view")
        for member in typed(view, View).members if view is not None else ():
            found.setdefault(member.rank, {}).setdefault(member.incarnation, revision.at)
    return {rank: sorted(back.items()) for rank, back in found.items()}


def _gone(evidence: Evidence) -> set[int]:
    """Incarnations whose end is in the membership: by an exit record, or by a view that leaves them out again."""
    gone: set[int] = set()
    members: set[int] = set()
    for revision in evidence.revisions:
        view = revision.put("view")
        if view is not None:
            now = {member.incarnation for member in typed(view, View).members}
            gone |= members - now
            members = now
        for name, changed in revision.changes.items():
            if name.startswith("exits/") and not changed.deleted:
                gone.add(typed(changed, RankExit).incarnation)
            elif name.startswith("ranks/") and changed.deleted:
                gone.add(int(name.rpartition("/")[2]))
    return gone


def _pauses(evidence: Evidence) -> list[float]:
    """For each fault the longest pause that it may have caused: it is the last fault before the pause ended."""
    times = [injected.fault.at for injected in evidence.faults]
    longest = [0.0] * len(times)
    for began, ended in _waits(evidence):
        number = bisect_right(times, ended) - 1
        if number >= 0 and began <= times[number] + AFTER_S:
            longest[number] = max(longest[number], round((ended - began) * 1000.0, 3))
    return longest


def _waits(evidence: Evidence) -> Iterator[tuple[float, float]]:
    """Gaps between tokens longer than `PAUSE_MS`: begin and end."""
    for record in evidence.answered:
        for before, after in pairwise(record.token_times):
            if after - before > PAUSE_MS / 1000.0:
                yield evidence.wall(before), evidence.wall(after)
