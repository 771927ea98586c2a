"""Judges the record of a run: each check of `chaos/checks`, what the run found out itself, and a table of it all.

Pure, and linear in the number of lines but for sorting what is nearly sorted.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import msgspec

from chaos.check.commits import check_commits, check_incarnations
from chaos.check.coverage import check_coverage
from chaos.check.evictions import check_evictions
from chaos.check.evidence import Evidence, Outcome, Trial
from chaos.check.faults import check_faults
from chaos.check.fences import check_fences
from chaos.check.operations import check_operations
from chaos.check.reads import check_reads, check_watch
from chaos.check.requests import check_requests
from chaos.record.record import AnyLine

CHECKS: tuple[Callable[[Evidence], Outcome], ...] = (
    check_commits, check_incarnations, check_watch, check_reads, check_fences, check_requests, check_coverage,
    check_operations, check_evictions, check_faults,
)  # fmt: skip
TOLD = 5  # findings of one check that the text shows


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What came of all checks."""

    ok: bool  # nothing is broken, and there was something to judge
    what: str
    seed: int
    lines: int
    outcomes: tuple[Outcome, ...]


def judge(lines: Iterable[AnyLine]) -> Verdict:
    """Check a record."""
    with _uncollected():
        counted = _Counted(lines)
        evidence = Evidence(counted)
        outcomes = [*(check(evidence) for check in CHECKS), *_said(evidence)]
    broken = any(outcome.broken for outcome in outcomes)
    judged = any(outcome.judged for outcome in outcomes if outcome.promise != "-")
    return Verdict(
        ok=judged and not broken, what=evidence.header.what, seed=evidence.header.seed, lines=counted.count,
        outcomes=tuple(outcomes),
    )  # fmt: skip


def table(verdict: Verdict) -> Iterator[str]:
    """The verdict in lines: promise by promise, then what broke and the lines that show it."""
    yield f"{verdict.what or 'a record'}, seed {verdict.seed}, {verdict.lines} lines"
    yield ""
    for outcome in verdict.outcomes:
        figures = ", ".join(f"{name.replace('_', ' ')} {value}".removeprefix("said ")
                            for name, value in outcome.figures.items())  # fmt: skip
        yield f"{outcome.promise:<3} {outcome.title:<14} {outcome.verdict:<12} {figures}".rstrip()
    for outcome in verdict.outcomes:
        for finding in outcome.findings[:TOLD]:
            yield ""
            yield f"{finding.promise} {outcome.title}: {finding.what}"
            yield from (f"    {line}" for line in finding.lines)
        if outcome.broken > TOLD:
            yield f"    … and {outcome.broken - TOLD} more of {outcome.title}"
    yield ""
    held = "every promise that could be judged held" if verdict.ok else "nothing was judged"
    yield "a promise broke" if any(outcome.broken for outcome in verdict.outcomes) else held


def _said(evidence: Evidence) -> Iterator[Outcome]:
    """What the run itself has verified, a row each."""
    for line in evidence.verified:
        trial = Trial(line.promise, "by the run", evidence, judged=1)
        trial.figures["said"] = line.said
        if not line.ok:
            trial.found(line.said)
        yield trial.outcome()


class _Counted:
    """Lines, counted as they go by."""

    def __init__(self, lines: Iterable[AnyLine]) -> None:
        self._lines = lines
        self.count = 0

    def __iter__(self) -> Iterator[AnyLine]:
        for line in self._lines:
            self.count += 1
            yield line


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cycle collector: a record makes millions of objects and no cycles, and each pass would see all."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
