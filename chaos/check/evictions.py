"""G9, no false eviction: a rank is masked only after a fault was injected into it or into a parent process."""

from __future__ import annotations

from chaos.check.evidence import Check, Evidence
from chaos.record.record import Happened, InjectedFault

PARENTS = ("agent", "supervisor", "forkserver", "host", "all ranks")  # their end ends ranks too
PARENT_S = 60.0  # at most this long after the fault


class Evictions(Check):
    """Each masked rank, or its agent, was the victim of a fault before."""

    promise, title = "G9", "evictions"

    def finish(self) -> None:
        evidence = self.evidence
        if not evidence.revisions:
            return  # only the store's records say which process was which rank
        first = _first_faults(evidence)
        parents = [injected for injected in evidence.faults if injected.fault.victim.startswith(PARENTS)]
        for event in evidence.events:
            if event.kind != "rank_masked" or evidence.moved_on(event):
                continue
            self.judged += 1
            fault = first.get(int(event.fields.get("incarnation", 0)))
            with_parent = any(parent.fault.at <= event.ts <= parent.fault.at + PARENT_S for parent in parents)
            if not with_parent and (fault is None or fault.fault.at > event.ts):
                what = f"rank {event.rank} was given up ({event.fields.get('source')}), and nothing had been done to it"
                self.found(what, Happened(event=event), fault)
        self.figures["given_up"] = self.judged


def _first_faults(evidence: Evidence) -> dict[int, InjectedFault]:
    """Incarnation -> the first fault of its process. (A process id may be used again: the last use before counts.)"""
    ran: dict[int, list[tuple[float, int]]] = {}
    for line in evidence.rank_records:
        ran.setdefault(int(line.value.get("pid", 0)), []).append((line.at, int(line.value["incarnation"])))
    found: dict[int, InjectedFault] = {}
    for injected in evidence.faults:
        known = ran.get(injected.fault.pid, [])
        before = [incarnation for at, incarnation in known if at <= injected.fault.seen_at]
        for incarnation in before[-1:] or [incarnation for _, incarnation in known[:1]]:
            found.setdefault(incarnation, injected)
    return found
