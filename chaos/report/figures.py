"""A record of a run as the figures that its report shows: one frozen struct, also written as JSON. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from chaos.check.evidence import Evidence
from chaos.record.record import AnyLine, Header
from chaos.report import lanes
from chaos.report.faults import Followed, Kind, followed, kinds
from chaos.report.promises import Checked, Promise, exactness, promises
from chaos.report.streams import Seen, seen
from chaos.workload.history import RequestRecord, difference, percentile
from membership.base.errors import ConfigError


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """The durations of one thing, over those faults after which it happened."""

    count: int
    p50_ms: float
    p99_ms: float


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers at the top."""

    faults: int
    kinds: int
    requests: int
    tokens: int
    lost: int
    duplicated: int
    altered: int
    refused: int  # answered with another status than 200, or not at all
    noticed: Spread
    resumed: Spread
    whole: Spread
    epochs: int
    operations: int
    rolled_back: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """All that the page shows. Times are seconds since `run.started`, unless a name says milliseconds."""

    run: Header
    duration_s: float
    verdict: str  # held | broke | unjudged
    promises: tuple[Promise, ...]
    totals: Totals
    seen: Seen
    ranks: tuple[lanes.Lane, ...]
    roles: tuple[lanes.Lane, ...]
    epochs: tuple[lanes.Epoch, ...]
    operations: tuple[lanes.Change, ...]
    faults: tuple[Followed, ...]
    kinds: tuple[Kind, ...]


def figures(lines: Iterable[AnyLine], checks: Sequence[Checked] = ()) -> Figures:
    """The figures of a record. `checks`: the checker's findings, beside what the run itself verified."""
    evidence = Evidence(lines)
    header, oracle, zero = evidence.header, evidence.oracle, evidence.header.started
    if not zero:
        raise ConfigError("the record has no header", hint="its first line says what was run")
    history = sorted(evidence.answered, key=lambda record: record.started)
    duration_s = _duration(evidence)
    wrong = {
        number: found
        for number, record in enumerate(history)
        if record.prompt in oracle and (found := difference(record, oracle[record.prompt])) is not None
    }
    kinds_wrong = Counter(each.kind for each in wrong.values())
    unmatched = sum(record.prompt not in oracle for record in history)
    named = {_name(number, history[number], zero - header.wall): each for number, each in wrong.items()}
    mine = (history or oracle) and all(each.promise != "G3" for each in checks)  # the checker's says more
    own = [exactness(named, len(history) - unmatched, unmatched)] if mine else []
    said = [Checked(promise=line.promise, ok=line.ok, said=line.said) for line in evidence.verified]
    kept = promises([*said, *checks, *own])

    clients, gaps = seen(history, tuple(oracle.values()), zero - header.wall, duration_s, sorted(wrong))
    ranks, roles = lanes.ranks(evidence, duration_s), lanes.roles(evidence, duration_s)
    faults = followed(evidence, (*ranks, *roles), gaps)
    epochs, operations = lanes.epochs(evidence), lanes.operations(evidence, duration_s)
    return Figures(
        run=header, duration_s=duration_s, verdict=_verdict(kept), promises=kept,
        totals=Totals(
            faults=len(faults), kinds=len({each.fault for each in faults}),
            requests=len(history), tokens=clients.tokens,
            lost=kinds_wrong["lost"], duplicated=kinds_wrong["duplicated"], altered=kinds_wrong["altered"],
            refused=sum(record.status != 200 for record in history),
            epochs=sum(each.at >= 0 for each in epochs),
            operations=len(operations), rolled_back=sum(each.ended == "aborted" for each in operations),
            noticed=_spread([each.noticed_ms for each in faults]),
            resumed=_spread([each.resumed_ms for each in faults]),
            whole=_spread([each.whole_ms for each in faults]),
        ),
        seen=clients, ranks=ranks, roles=roles, epochs=epochs, operations=operations, faults=faults,
        kinds=kinds(faults),
    )  # fmt: skip


def _name(number: int, record: RequestRecord, zero: float) -> str:
    return (
        f"request {number + 1} (prompt {record.prompt}{record.id and ', '}{record.id}) of {record.started - zero:.3f} s"
    )


def _duration(evidence: Evidence) -> float:
    """From the begin of the run to the last thing that the record shows, in seconds."""
    tokens = (record.token_times[-1] for record in evidence.answered if record.token_times)
    ends = [evidence.wall(max(tokens, default=-evidence.header.wall))]
    ends += [at for line in evidence.faults for at in (line.fault.at, line.healed_at)]
    ends += [event.ts for event in evidence.events[-1:]]
    return round(max(0.001, max(ends) - evidence.header.started), 3)


def _verdict(kept: Sequence[Promise]) -> str:
    found = {each.verdict for each in kept}
    return "broke" if "broke" in found else "held" if "held" in found else "unjudged"


def _spread(found: Sequence[float]) -> Spread:
    values = [value for value in found if value >= 0]
    return Spread(count=len(values), p50_ms=percentile(values, 0.5), p99_ms=percentile(values, 0.99))
