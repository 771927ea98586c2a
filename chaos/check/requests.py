"""G3, exactly once and token exact: every answer equals that of the fault-free run.

Two cases are not promised, and are counted as excused: a stream of a killed gateway (HTTP cannot hand a connection
over), and a request that waited for lost experts longer than the coverage deadline.
"""

from __future__ import annotations

from bisect import bisect_right

from chaos.check.evidence import QUOTED_FINDINGS, Check, Evidence
from chaos.record.record import Answered, Expected, Happened, InjectedFault
from chaos.workload.history import Difference, RequestRecord, difference
from membership.store.records import ClusterConfig

FRONT = ("gateway", "supervisor", "host", "client")  # their faults break connections
FRONT_RECOVERY_S = 15.0  # until there is a gateway again
COVERAGE_SLACK_S = 1.0

Span = tuple[float, float]


class Requests(Check):
    """Each request against the oracle."""

    promise, title = "G3", "requests"

    def finish(self) -> None:
        evidence = self.evidence
        counts = dict.fromkeys(("lost", "duplicated", "altered", "excused"), 0)
        uncovered, broken = _uncovered(evidence), _broken_front(evidence)
        for record in evidence.oracle.values():
            if not record.complete:
                what = f"the fault-free run of prompt {record.prompt} failed: {record.error}"
                self.found(what, Expected(record=record))
        ids: dict[str, RequestRecord] = {}
        for record in evidence.answered:
            expected = evidence.oracle.get(record.prompt)
            if expected is None:
                self.found(f"there is no fault-free run of prompt {record.prompt}", Answered(record=record))
                continue
            self.judged += 1
            twin = ids.setdefault(record.id, record) if record.id else record
            if twin is not record:
                self.found(f"two requests had the id {record.id}", Answered(record=twin), Answered(record=record))
            found = difference(record, expected)
            if found is None:
                continue
            if not record.complete and _excused(evidence, record, uncovered, broken):
                counts["excused"] += 1
                continue
            counts[found.kind] += 1
            self._different(record, found)
        tokens = sum(len(record.tokens) for record in evidence.answered)
        self.figures |= {"requests": len(evidence.answered), "tokens": tokens, **counts}

    def _different(self, record: RequestRecord, found: Difference) -> None:
        refused = "; every expert had a live replica" if record.error.startswith("HTTP ") else ""
        what = f"request {record.id or 'without id'} of prompt {record.prompt} was {found.kind}: {found.explanation}"
        around = _around(self.evidence, record) if len(self.findings) < QUOTED_FINDINGS else ()
        self.found(what + refused, Answered(record=record), *around)


def _span(evidence: Evidence, record: RequestRecord) -> Span:
    """When the request was under way, as far as is known."""
    last = record.ended or (record.token_times[-1] if record.token_times else record.started)
    return evidence.wall(record.started), evidence.wall(last)


def _excused(evidence: Evidence, record: RequestRecord, uncovered: list[Span], broken: list[Span]) -> bool:
    began, ended = _span(evidence, record)
    config = evidence.config or ClusterConfig(cluster="", model="", served_model_name="", moe_layers=1, experts=1)
    waited = max((min(b, ended) - max(a, began) for a, b in uncovered), default=0.0)
    if waited >= config.coverage_deadline_s - COVERAGE_SLACK_S:
        return True
    return not record.error.startswith("HTTP ") and any(a <= ended and began <= b for a, b in broken)


def _uncovered(evidence: Evidence) -> list[Span]:
    """When some expert had no live replica, as the engine reported."""
    spans: list[Span] = []
    since: float | None = None
    for _, revision in evidence.walk():
        status = revision.put("engine-status")
        if status is None:
            continue
        lacking = bool(status.value.get("uncovered"))
        if lacking and since is None:
            since = status.at
        elif not lacking and since is not None:
            spans.append((since, status.at))
            since = None
    return [*spans, (since, evidence.ended)] if since is not None else spans


def _broken_front(evidence: Evidence) -> list[Span]:
    """When connections may have been broken by a fault."""
    faults = [injected for injected in evidence.faults if injected.fault.victim.startswith(FRONT)]
    return [(d.fault.at, max(d.fault.seen_at, d.healed_at) + FRONT_RECOVERY_S) for d in faults]


def _around(evidence: Evidence, record: RequestRecord) -> list[InjectedFault | Happened]:
    """The faults and the cluster's reactions during the request."""
    began, ended = _span(evidence, record)
    times = [injected.fault.at for injected in evidence.faults]
    faults = evidence.faults[bisect_right(times, began) : bisect_right(times, ended)]
    stamps = [event.ts for event in evidence.events]
    events = evidence.events[bisect_right(stamps, began) : bisect_right(stamps, ended)]
    shown = [e for e in events if e.kind in ("rank_masked", "epoch_adopted", "engine_elected", "role_died")]
    return [*faults[:2], *(Happened(event=event) for event in shown[:3])]
