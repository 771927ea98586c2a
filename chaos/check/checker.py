"""Runs all checks over the record of a run and makes a table of the results, with what the run itself verified.

Pure, and linear in the number of lines except for sorting what is nearly sorted.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec

from chaos.check.commits import Commits, Incarnations
from chaos.check.coverage import Coverage
from chaos.check.evictions import Evictions
from chaos.check.evidence import Check, Evidence, Outcome, run
from chaos.check.faults import FaultsProven
from chaos.check.fences import Fences
from chaos.check.operations import Operations
from chaos.check.reads import Reads, Watch
from chaos.check.requests import Requests
from chaos.record.record import AnyLine, Verified

CHECKS: tuple[type[Check], ...] = (
    Commits, Incarnations, Watch, Reads, Fences, Requests, Coverage, Operations, Evictions, FaultsProven,
)  # fmt: skip
SHOWN = 5  # findings of one check in the text


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result of all checks."""

    ok: bool  # nothing is broken, and there was something to check
    what: str
    seed: int
    lines: int
    outcomes: tuple[Outcome, ...]


def check_record(lines: Iterable[AnyLine]) -> Verdict:
    """Check a record."""
    with _uncollected():
        evidence = Evidence(lines)
        outcomes = (*run(evidence, *CHECKS), *(_verified(evidence, line) for line in evidence.verified))
    broken = any(outcome.broken for outcome in outcomes)
    judged = any(outcome.judged for outcome in outcomes if outcome.promise != "-")
    header = evidence.header
    return Verdict(
        ok=judged and not broken, what=header.what, seed=header.seed, lines=evidence.count, outcomes=outcomes
    )


def table(verdict: Verdict) -> Iterator[str]:
    """The verdict as lines of text: each promise, then each finding with the lines that show it."""
    yield f"{verdict.what or 'a record'}, seed {verdict.seed}, {verdict.lines} lines"
    yield ""
    for outcome in verdict.outcomes:
        named = (f"{name.replace('_', ' ')} {value}".removeprefix("said ") for name, value in outcome.figures.items())
        yield f"{outcome.promise:<3} {outcome.title:<14} {outcome.verdict:<12} {', '.join(named)}".rstrip()
    for outcome in verdict.outcomes:
        for finding in outcome.findings[:SHOWN]:
            yield ""
            yield f"{finding.promise} {outcome.title}: {finding.what}"
            yield from (f"    {line}" for line in finding.lines)
        if outcome.broken > SHOWN:
            yield f"    … and {outcome.broken - SHOWN} more of {outcome.title}"
    yield ""
    held = "every promise that could be checked held" if verdict.ok else "nothing was checked"
    yield "a promise broke" if any(outcome.broken for outcome in verdict.outcomes) else held


def _verified(evidence: Evidence, line: Verified) -> Outcome:
    """A row for something that the run itself has verified."""
    check = Check(evidence)
    check.promise, check.title, check.judged = line.promise, "by the run", 1
    check.figures["said"] = line.said
    if not line.ok:
        check.found(line.said)
    return check.outcome()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cycle collector: a record makes millions of objects without cycles, and each pass visits them all."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
