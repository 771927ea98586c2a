"""The nine promises in one sentence each, and the verdict on each. Pure.

A promise may be checked by the run itself, by the offline checker, and by this report from what clients saw: it held
if all of them say so. A promise without any check is shown as unjudged, never as held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from chaos.check.evidence import Outcome
from chaos.workload.history import Difference

SHOWN = 20  # lines of evidence per promise; the rest is counted

PROMISES: dict[str, tuple[str, str]] = {
    "G1": ("One truth", "Epochs rise by exactly one; of two controllers that believe they lead, one can act."),
    "G2": ("Fencing", "A process that was replaced or evicted has no effect any more, even if it still runs."),
    "G3": ("Exactly once, token exact", "No token is lost, doubled or altered: streams equal a run without faults."),
    "G4": ("Coverage", "No answer lacks an expert, and none is refused while a replica is live."),
    "G5": ("Atomic operations", "A scale, drain or undrain ends done or rolled back, by its deadline."),
    "G6": ("No single point of failure", "Whatever role dies comes back by itself, and serving goes on."),
    "G7": ("Nothing leaks", "No process, memory, file or thread is left behind or grows."),
    "G8": ("Every wait has a deadline", "Each wait ends in time, and names the process that it waited for."),
    "G9": ("No false eviction", "A rank whose heartbeat advances is never evicted."),
}  # fmt: skip

BESIDE = {"Faults": "What makes the rest worth something: each fault was seen to happen."}  # checked, but no promises


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """One check of one promise: what was found, in words, and the events that show it if it broke."""

    promise: str
    ok: bool
    said: str = ""
    evidence: tuple[str, ...] = ()


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """One promise as the page shows it."""

    id: str
    name: str
    states: str
    verdict: str  # held | broke | unjudged
    said: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    unshown: int = 0  # lines of evidence that were left out


def exactness(differences: Mapping[str, Difference], requests: int, unmatched: int) -> Checked:
    """G3 from what clients saw: the differences from the fault-free run by a name for the request.

    `unmatched`: requests whose prompt has no fault-free answer to be held against.
    """
    kinds = Counter(each.kind for each in differences.values())
    counts = ", ".join(f"{kinds[kind]:,} {kind}" for kind in ("lost", "duplicated", "altered"))
    without = [f"{unmatched:,} requests have no fault-free answer to be held against"] if unmatched else []
    found = [f"{name}: {each.kind}, {each.explanation}" for name, each in differences.items()]
    return Checked(
        promise="G3",
        ok=requests > 0 and not differences and not unmatched,
        said=f"{requests:,} requests held against the fault-free run, token by token: {counts}",
        evidence=(*without, *found),
    )


def checked(outcomes: Iterable[Outcome]) -> tuple[Checked, ...]:
    """The outcomes of the offline checker (`chaos/check/`), except of checks that had nothing to check."""
    return tuple(_checked(outcome) for outcome in outcomes if outcome.judged or outcome.broken)


def _checked(outcome: Outcome) -> Checked:
    figures = outcome.figures
    counted = ", ".join(_figure(name, value) for name, value in figures.items())
    return Checked(
        # A check of the record itself belongs to no promise: it is listed under its own name.
        promise=outcome.promise if outcome.promise in PROMISES else outcome.title.capitalize(),
        ok=not outcome.broken,
        said=str(figures.get("said", counted if outcome.title in figures else f"{outcome.title}: {counted}")),
        evidence=tuple("\n    ".join((finding.what, *finding.lines)) for finding in outcome.findings),
    )


def _figure(name: str, value: int | float | str) -> str:
    """`3 epochs`, `noticed p50 8.3 ms`."""
    number = f"{value:,}" if isinstance(value, int | float) else value
    if "_ms" in name or " ms" in name:
        words = name.replace("_", " ").replace(" ms", "").replace(",", "")
        return f"{words} {number} ms"
    return f"{number} {name.replace('_', ' ')}"


def promises(checks: Iterable[Checked]) -> tuple[Promise, ...]:
    """All nine, and any other that was checked, in order."""
    found: dict[str, list[Checked]] = {name: [] for name in PROMISES}
    for each in checks:
        found.setdefault(each.promise, []).append(each)
    return tuple(_promise(name, each) for name, each in found.items())


def _promise(name: str, checks: Sequence[Checked]) -> Promise:
    title, states = PROMISES.get(name) or (name, BESIDE.get(name, ""))
    evidence = list(dict.fromkeys(line for each in checks if not each.ok for line in each.evidence))
    return Promise(
        id=name if name in PROMISES else "",
        name=title,
        states=states,
        verdict="unjudged" if not checks else "held" if all(each.ok for each in checks) else "broke",
        said=tuple(dict.fromkeys(each.said for each in checks if each.said)),
        evidence=tuple(evidence[:SHOWN]),
        unshown=max(0, len(evidence) - SHOWN),
    )
