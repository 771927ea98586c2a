"""Faults of whole families: a parent dies and leaves children behind; a host dies, with everybody on it at once.

That the children end too is the product's promise and is judged by whoever deals this, not proven here.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack, suppress

import psutil

from chaos.faults.base import NotInjected, Site
from chaos.faults.fault import Fault
from chaos.faults.process import SEEN_S, Hold, OnProcess


class ParentDeath(OnProcess):
    """SIGKILL of a process that has children."""

    name = "parent-death"

    def _deal(self, hold: Hold) -> str:
        children = len(_below(self.site, hold.pid))
        if not children:
            raise NotInjected(f"{self.victim} has no children now")
        hold.send(signal.SIGKILL)
        if not hold.gone(SEEN_S):
            raise NotInjected(f"{self.victim}, process {hold.pid}, did not end within {SEEN_S:g} s of SIGKILL")
        return f"pidfd says gone after SIGKILL; it left {children} children and grandchildren"


class HostDeath(OnProcess):
    """A host goes: SIGKILL of an agent and of everything below it, all stopped first, so that nobody sees it coming."""

    name = "host-death"

    def _deal(self, hold: Hold) -> str:
        with ExitStack() as holds:
            family = [hold]
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in _below(self.site, hold.pid):
                    if pid not in [each.pid for each in family]:
                        family.append(Hold(pid, f"{self.victim}'s process {pid}"))
                        holds.callback(family[-1].close)
                for each in family:
                    each.send(number)
            left = [each.victim for each in family if not each.gone(SEEN_S)]
        if left:
            raise NotInjected(f"did not end within {SEEN_S:g} s of SIGKILL: {', '.join(left)}")
        return f"pidfds say that all {len(family)} processes are gone"

    def _heal(self, hold: Hold) -> None:
        hold.send(signal.SIGCONT)


def _below(site: Site, pid: int) -> set[int]:
    """Children and grandchildren; an agent's forkserver may be a fork of a process that is above both."""
    parents = {pid}
    with suppress(NotInjected):
        parents.add(site.pid("forkserver"))
    found = parents
    for parent in parents:
        with suppress(psutil.NoSuchProcess):
            found = found | {child.pid for child in psutil.Process(parent).children(recursive=True)}
    return found - {pid}


FAULTS = {
    "parent-death": Fault(
        about="SIGKILL of a process with children", victims=("supervisor", "agent", "forkserver"),
        heals=False, make=ParentDeath,
    ),
    "host-death": Fault(
        about="SIGKILL of an agent and all its ranks at once", victims=("agent",), heals=False, make=HostDeath
    ),
}  # fmt: skip
