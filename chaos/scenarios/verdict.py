"""What a finished run proved. Pure; every number of the receipt was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from chaos.faults.base import Injected
from chaos.scenarios.script import Expect, Scenario
from chaos.workload.history import RequestRecord, Verdict, compare
from membership.base.events import Event
from membership.store.records import Operation

TOLD = 10  # differences that are told; all are in the record


class RunReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """`ok` is False if a promise broke; `broken` says which."""

    ok: bool
    scenario: str
    seed: int
    rounds: int
    faults: dict[str, int]  # each was seen to happen
    operations: dict[str, int]  # how many ended how
    requests: int
    tokens: int
    lost: int
    duplicated: int
    altered: int
    non_2xx: int
    seconds: float
    whole_max_ms: float  # the longest way back to full strength, from the last deed before it
    max_token_gap_ms: float
    epochs: int
    replay: str
    broken: tuple[str, ...] = ()


@dataclass
class Played:
    """What a run has gathered."""

    scenario: Scenario
    seed: int
    replay: str = ""
    rounds: int = 0
    faults: list[Injected] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    oracle: dict[int, RequestRecord] = field(default_factory=dict)
    history: list[RequestRecord] = field(default_factory=list)
    whole_ms: list[float] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)  # steps that could not be done, and what was not whole again
    seconds: float = 0.0


def receipt(played: Played) -> RunReceipt:
    """Judge a run."""
    verdict = compare(played.history, played.oracle)
    counts = counted(played.history, verdict)
    committed = [event.epoch for event in played.events if event.kind == "epoch_committed"]
    broken = [*played.troubles, *beyond(counts, played.scenario.expect, verdict)]
    failed = [record for record in played.oracle.values() if not record.complete]
    broken += [f"the fault-free run of prompt {record.prompt} failed: {record.error}" for record in failed]
    if not played.history:
        broken.append("no request was compared")
    if played.scenario.blows and not played.faults:
        broken.append("no fault was dealt")
    if committed != sorted(set(committed)):
        broken.append(f"epochs do not rise: {committed}")
    return RunReceipt(
        ok=not broken,
        scenario=played.scenario.name,
        seed=played.seed,
        rounds=played.rounds,
        faults=dict(Counter(fault.fault for fault in played.faults)),
        operations=dict(Counter(operation.phase.value for operation in played.operations)),
        requests=verdict.requests,
        tokens=sum(len(record.tokens) for record in played.history),
        seconds=round(played.seconds, 1),
        whole_max_ms=round(max(played.whole_ms, default=0.0), 1),
        max_token_gap_ms=round(max((gap for r in played.history for gap in r.gaps_ms()), default=0.0), 1),
        epochs=len(set(committed)),
        replay=played.replay,
        broken=tuple(broken),
        **counts,
    )


def counted(history: Sequence[RequestRecord], verdict: Verdict) -> dict[str, int]:
    """How many requests were what they should not be. A request that was refused was not admitted, and is not lost."""
    refused = sum(record.error.startswith("HTTP ") for record in history)
    counts = {kind: verdict.count(kind) for kind in ("lost", "duplicated", "altered")}
    return {**counts, "lost": counts["lost"] - refused, "non_2xx": refused}


def beyond(counts: dict[str, int], expect: Expect, verdict: Verdict) -> list[str]:
    """What is more than it may be, with the requests that show it."""
    found: list[str] = []
    for kind, count in counts.items():
        most = getattr(expect, kind)
        if most is None or count <= most:
            continue
        found.append(f"requests {kind.replace('_', '-')}: {count}, and at most {most} may be")
        sort = "lost" if kind == "non_2xx" else kind
        found += [f"request {d.prompt} {d.kind}: {d.explanation}" for d in verdict.differences if d.kind == sort][:TOLD]
    return found
