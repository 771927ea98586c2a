"""G9 from a record: a masked rank had a fault, itself or its agent; else it was evicted for nothing."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from chaos.check.evictions import Evictions
from chaos.check.evidence import Evidence, Outcome, run
from chaos.record.record import AnyLine, Happened, InjectedFault
from tests.support.recorded_run import good_lines

pytestmark = pytest.mark.unit


def with_fault(**changes: object) -> list[AnyLine]:
    """The good run, its fault changed."""
    return [
        replace(line, fault=replace(line.fault, **changes)) if isinstance(line, InjectedFault) else line
        for line in good_lines()
    ]


def checked(lines: Iterable[AnyLine]) -> Outcome:
    return run(Evidence(lines), Evictions)[0]


def test_a_rank_with_a_fault_may_be_evicted() -> None:
    outcome = checked(good_lines())
    assert (outcome.verdict, outcome.judged, outcome.promise) == ("held", 1, "G9")
    assert checked(with_fault(victim="agent", pid=1)).verdict == "held"


def test_who_was_not_may_not() -> None:
    lines = [line for line in good_lines() if not isinstance(line, InjectedFault)]
    assert checked(lines).verdict == "broken"
    (finding,) = checked(with_fault(pid=1)).findings
    assert "rank 1 was given up" in finding.what
    assert "rank_masked" in finding.lines[0]


def test_a_fault_that_came_later_does_not_explain_it() -> None:
    outcome = checked(with_fault(at=2e9, seen_at=2e9))
    assert outcome.verdict == "broken"
    assert len(outcome.findings[0].lines) == 2


@pytest.mark.parametrize(("successor", "broken"), [(5, False), (4, True)])
def test_a_rank_that_left_a_deposed_engines_queue_for_its_successors_was_not_evicted(
    successor: int, broken: bool
) -> None:
    lines: list[AnyLine] = []
    for line in with_fault(pid=1):
        if isinstance(line, Happened) and line.event.kind == "rank_masked":
            fields = {**line.event.fields, "source": "queue", "token": 4}
            joined = {**line.event.fields, "token": successor}
            attached = replace(line.event, ts=line.event.ts + 1.0, kind="rank_attached", role="agent", fields=joined)
            lines += [Happened(event=replace(line.event, fields=fields)), Happened(event=attached)]
        else:
            lines.append(line)
    assert bool(checked(lines).broken) is broken
