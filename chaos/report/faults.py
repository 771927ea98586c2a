"""Each fault and what followed from it: when it was noticed, when requests went on, when all was whole again. Pure.

The effects of a fault are taken from the events of its victim. Without an event there is no figure: nothing is guessed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from chaos.check.evidence import Evidence
from chaos.check.faults import over
from chaos.record.record import InjectedFault
from chaos.report.lanes import UP, Lane
from chaos.report.streams import Gaps
from chaos.workload.history import percentile
from membership.base.events import Event

GAP_WINDOW_S = 1.0  # a gap that was open within this time after a fault, and before the next one, counts as its own
FOLLOW_S = 120.0  # later events of a victim are not attributed to the fault
NOTICED = ("rank_masked", "rank_died", "rank_left", "rank_slow", "rank_exited")
FAMILIES: dict[str, tuple[str, ...]] = {  # by words in the fault's name; the first that fits
    "death": ("kill", "segv", "oom", "crash", "raise", "death"),
    "network": ("net-", "host-", "link", "cut", "drop", "partition", "proxy"),
    "clock": ("clock", "skew"),
    "store": ("etcd", "lease", "disk", "checkpoint"),
    "memory": ("bit-flip", "torn", "shm", "oversize", "reader", "fd-"),
    "freeze": ("stop", "hang", "slow", "delay", "wait"),
}


class Followed(msgspec.Struct, frozen=True, kw_only=True):
    """One fault as the page shows it. Times in seconds since the run began; -1: no event shows it."""

    number: int
    fault: str
    family: str
    victim: str
    lane: str  # on the timeline: the engine in office may be either of two processes
    at: float
    proven_ms: float  # until it was seen to have taken effect
    proof: str
    pid: int = 0
    healed: float = -1.0
    noticed_ms: float = -1.0  # until the first event about it
    noticed_by: str = ""
    resumed_ms: float = -1.0  # until every request that ran there had a new token
    whole_ms: float = -1.0  # until the victim was replaced
    gap_ms: float = 0.0  # the longest that any stream waited for a token around it


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """All faults of one name together."""

    fault: str
    family: str
    count: int
    victims: tuple[str, ...]
    noticed: int
    noticed_p50_ms: float
    noticed_max_ms: float
    whole: int
    whole_p50_ms: float
    whole_max_ms: float
    gap_max_ms: float


def family(fault: str) -> str:
    """The family of a fault, for its sign on the timeline."""
    return next((name for name, words in FAMILIES.items() if any(word in fault.lower() for word in words)), "other")


def followed(evidence: Evidence, lanes: Sequence[Lane], gaps: Gaps) -> tuple[Followed, ...]:
    """All faults, by time."""
    faults, events = evidence.faults, evidence.events
    run = _Run(
        events, [event.ts for event in events], {lane.name: lane for lane in lanes}, gaps, evidence.header.started
    )
    found = []
    for number, (line, until) in enumerate(zip(faults, over(faults), strict=True), 1):
        at = line.fault.at
        gap_until = min([at + GAP_WINDOW_S, *(other.fault.at for other in faults[number : number + 1])])
        found.append(run.followed(number, line, min(until, at + FOLLOW_S), gap_until))
    return tuple(found)


@dataclass(frozen=True)
class _Run:
    """What is known of a run, to find what followed from one fault. `zero`: when it began."""

    events: Sequence[Event]
    times: Sequence[float]
    lanes: Mapping[str, Lane]
    gaps: Gaps
    zero: float

    def followed(self, number: int, line: InjectedFault, until: float, gap_until: float) -> Followed:
        """Events of the victim count from the fault to `until`, gaps to `gap_until`."""
        fault, zero = line.fault, self.zero
        events = self.events[bisect_left(self.times, fault.at) : bisect_left(self.times, until)]
        noticed = next((event for event in events if _tells(event, fault.victim, fault.pid)), None)
        resumed = self._resumed(fault.victim, events)
        whole = self._whole(fault.at - zero, fault.victim, noticed) if noticed is not None else None
        return Followed(
            number=number, fault=fault.fault, family=family(fault.fault), victim=fault.victim,
            lane=_lane(fault.victim, noticed), at=round(fault.at - zero, 3), proven_ms=_ms(fault.seen_at - fault.at),
            proof=fault.proof, pid=fault.pid, healed=round(line.healed_at - zero, 3) if line.healed_at else -1.0,
            noticed_ms=_ms(noticed.ts - fault.at) if noticed is not None else -1.0,
            noticed_by=_by(noticed) if noticed is not None else "",
            resumed_ms=_ms(resumed + zero - fault.at) if resumed is not None else -1.0,
            whole_ms=_ms(whole + zero - fault.at) if whole is not None else -1.0,
            gap_ms=round(self.gaps.largest(fault.at - zero, gap_until - zero), 1),
        )  # fmt: skip

    def _resumed(self, victim: str, events: Sequence[Event]) -> float | None:
        """When requests went on: those that ran on the rank; for an engine, any request under its successor."""
        if victim.startswith("engine"):
            elected = next((event.ts for event in events if event.kind == "engine_elected"), None)
            return self.gaps.next_token(elected - self.zero) if elected is not None else None
        recovered = (e.ts for e in events if e.kind == "rank_recovered" and f"rank {e.rank}" == victim)
        return next((ts - self.zero for ts in recovered), None)

    def _whole(self, at: float, victim: str, noticed: Event) -> float | None:
        """When the victim was replaced; for an agent, also the ranks that died with it."""
        wanted = [_lane(victim, noticed)]
        if wanted == ["agent"]:
            wanted += [each for each, lane in self.lanes.items() if each.startswith("rank ") and lane.at(at) in UP]
        # Lanes are rounded to a millisecond: the state before the fault was noticed must not count as the return.
        since = noticed.ts - self.zero + 0.002
        lanes = [self.lanes[each] for each in wanted if each in self.lanes]
        if all(lane.at(since) in UP for lane in lanes):
            return None  # nothing had to be replaced
        back = [lane.up_after(since) for lane in lanes]
        return None if None in back else max((each for each in back if each is not None), default=None)


def _tells(event: Event, victim: str, pid: int) -> bool:
    """Whether the event reports a fault of this victim."""
    if victim.startswith("rank "):
        failed = event.kind == "step_setback" and event.fields.get("status") == "failed"
        return (failed or event.kind in NOTICED) and f"rank {event.rank}" == victim
    if event.kind == "role_died":
        # The engine in office may be either process: its pid says which.
        return event.fields.get("pid") == pid if pid else event.fields.get("name") == victim
    return victim == "etcd" and event.kind in ("etcd_died", "store_replaced")


def _lane(victim: str, noticed: Event | None) -> str:
    if noticed is None or noticed.kind != "role_died":
        return victim
    return str(noticed.fields.get("name", victim))


def _by(event: Event) -> str:
    how = event.fields.get("source") or event.fields.get("detected_by") or event.fields.get("reason") or ""
    return f"{event.role}: {event.kind}" + (f" ({how})" if how else "")


def kinds(faults: Sequence[Followed]) -> tuple[Kind, ...]:
    """By name, the most frequent first."""
    groups: dict[str, list[Followed]] = {}
    for each in faults:
        groups.setdefault(each.fault, []).append(each)
    return tuple(_kind(name, groups[name]) for name in sorted(groups, key=lambda name: (-len(groups[name]), name)))


def _kind(name: str, faults: Sequence[Followed]) -> Kind:
    noticed = [each.noticed_ms for each in faults if each.noticed_ms >= 0]
    whole = [each.whole_ms for each in faults if each.whole_ms >= 0]
    return Kind(
        fault=name, family=family(name), count=len(faults), victims=tuple(sorted({each.victim for each in faults})),
        noticed=len(noticed), noticed_p50_ms=percentile(noticed, 0.5), noticed_max_ms=max(noticed, default=0.0),
        whole=len(whole), whole_p50_ms=percentile(whole, 0.5), whole_max_ms=max(whole, default=0.0),
        gap_max_ms=max((each.gap_ms for each in faults), default=0.0),
    )  # fmt: skip


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000.0, 1)
