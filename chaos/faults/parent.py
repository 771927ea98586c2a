"""Faults of process trees: a parent dies and leaves children behind, or a host dies with all its processes at once.

That the children end too is the product's promise. The campaign checks it; it is not part of the proof here.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack, closing, suppress

import psutil

from chaos.faults.base import OBEYED_S, Faults, NotInjected, Site
from chaos.faults.process import Hold, ProcessInjector

FAULTS = Faults()


@FAULTS.entry(
    "parent-death", "SIGKILL of a process with children", victims=("supervisor", "agent", "forkserver"), heals=False
)
class ParentDeath(ProcessInjector):
    """SIGKILL of a process that has children."""

    def _affect(self, hold: Hold) -> str:
        children = len(_below(self.site, hold.pid))
        if not children:
            raise NotInjected(f"{self.victim} has no children now")
        return f"{hold.end(signal.SIGKILL)}; it left {children} children and grandchildren"


@FAULTS.entry("host-death", "SIGKILL of an agent and all its ranks at once", victims=("agent",), heals=False)
class HostDeath(ProcessInjector):
    """SIGKILL of an agent and everything below it; all are stopped first, so that none can react to another's end."""

    def _affect(self, hold: Hold) -> str:
        with ExitStack() as holds:
            family = {hold.pid: hold}
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in _below(self.site, hold.pid) - family.keys():
                    family[pid] = holds.enter_context(closing(Hold(pid, f"{self.victim}'s child")))
                for each in family.values():
                    each.send(number)
            left = [str(each.pid) for each in family.values() if not each.gone(OBEYED_S)]
        if left:
            raise NotInjected(f"did not end within {OBEYED_S:g} s of SIGKILL: processes {', '.join(left)}")
        return f"pidfds say that all {len(family)} processes are gone"

    def _restore(self, hold: Hold) -> None:
        hold.send(signal.SIGCONT)


def _below(site: Site, pid: int) -> set[int]:
    """Children and grandchildren. An agent's forkserver may have been forked by a process above both: it counts too."""
    parents = {pid}
    with suppress(NotInjected):
        parents.add(site.pid("forkserver"))
    found = parents
    for parent in parents:
        with suppress(psutil.NoSuchProcess):
            found = found | {child.pid for child in psutil.Process(parent).children(recursive=True)}
    return found - {pid}
