"""G9: whoever was given up had been struck. A rank that nobody touched and that was masked was evicted for nothing."""

from __future__ import annotations

from chaos.check.evidence import Evidence, Outcome, Trial
from chaos.record.record import Changed, Dealt, Happened

PARENTS = ("agent", "supervisor", "forkserver", "host", "all ranks")  # whose end takes ranks along
PARENT_S = 60.0  # so long after it at most


def check_evictions(evidence: Evidence) -> Outcome:
    """Each masked rank was the victim of a fault before, or its agent was."""
    trial = Trial("G9", "evictions", evidence)
    if not evidence.revisions:
        return trial.outcome()  # without the store's word nobody knows which process was which rank
    struck = _struck(evidence)
    parents = [dealt for dealt in evidence.faults if dealt.fault.victim.startswith(PARENTS)]
    for event in evidence.events:
        if event.kind != "rank_masked" or evidence.moved_on(event):
            continue
        trial.judged += 1
        fault = struck.get(int(event.fields.get("incarnation", 0)))
        taken = any(parent.fault.at <= event.ts <= parent.fault.at + PARENT_S for parent in parents)
        if not taken and (fault is None or fault.fault.at > event.ts):
            what = f"rank {event.rank} was given up ({event.fields.get('source')}), and nothing had been done to it"
            trial.found(what, Happened(event=event), fault)
    trial.figures["given_up"] = trial.judged
    return trial.outcome()


def _struck(evidence: Evidence) -> dict[int, Dealt]:
    """Incarnation -> the first fault dealt to its process. (Process ids may come again: the last one before counts.)"""
    records = [
        line for line in evidence.told
        if isinstance(line, Changed) and not line.deleted and line.key.startswith(evidence.prefix + "ranks/")
    ]  # fmt: skip
    ran: dict[int, list[tuple[float, int]]] = {}
    for line in records:
        ran.setdefault(int(line.value.get("pid", 0)), []).append((line.at, int(line.value["incarnation"])))
    found: dict[int, Dealt] = {}
    for dealt in evidence.faults:
        known = ran.get(dealt.fault.pid, [])
        before = [incarnation for at, incarnation in known if at <= dealt.fault.seen_at]
        for incarnation in before[-1:] or [incarnation for _, incarnation in known[:1]]:
            found.setdefault(incarnation, dealt)
    return found
