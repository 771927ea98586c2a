"""Faults inside a rank's step, dealt by failpoints: it raises, hangs (with the interpreter's lock or not), is late.

The cluster must have been served with --chaos. Proof is the event `failpoint`, which a process writes before it fails.
"""

from __future__ import annotations

import time

from chaos.faults.base import Injected, NotInjected, Site
from chaos.faults.fault import Fault, Params
from membership.base.events import Event
from membership.base.failpoints import KIND

POINT = "rank.step"
SEEN_S = 15.0  # a rank makes a step only if there are requests
POLL_S = 0.02


class AtStep:
    """One failpoint at `rank.step` of one rank."""

    def __init__(self, fault: str, action: str, site: Site, victim: str, params: Params) -> None:
        self.fault, self.action, self.site, self.victim = fault, action, site, victim
        self._times = int(params["times"])
        self._armed = False

    def inject(self) -> Injected:
        """Arm it, and wait until the history says that it happened."""
        rank, limit = int(self.victim.split()[1]), f"{self._times}*" if self._times else ""
        known = len(self.site.events())
        at = time.time()
        self._armed = True
        self.site.arm(f"{POINT}@{rank}={limit}{self.action}")
        deadline = time.monotonic() + SEEN_S
        while (found := self._dealt(rank, known)) is None:
            if time.monotonic() > deadline:
                self.heal()
                raise NotInjected(
                    f"{self.victim} did not pass {POINT} within {SEEN_S:g} s", hint="it makes steps only under load"
                )
            time.sleep(POLL_S)
        return Injected(
            fault=self.fault, victim=self.victim, at=at, seen_at=found.ts, pid=int(found.fields["pid"]),
            proof=f"event {KIND} in the history: {POINT} {found.fields['action']}",
        )  # fmt: skip

    def heal(self) -> None:
        """Disarm: who hangs goes on."""
        if self._armed:
            self.site.arm("")
            self._armed = False

    def _dealt(self, rank: int, known: int) -> Event | None:
        for event in self.site.events()[known:]:
            if event.kind == KIND and event.fields["name"] == POINT and event.rank == rank:
                return event
        return None


def _fault(name: str, about: str, action: str, heals: bool, **params: float) -> Fault:
    def make(site: Site, victim: str, given: Params) -> AtStep:
        return AtStep(name, action.format(**{key: int(value) for key, value in given.items()}), site, victim, given)

    return Fault(
        about=about, victims=("rank",), heals=heals, make=make, needs=("--chaos",), params={"times": 1, **params}
    )


FAULTS = {
    "step-raise": _fault("step-raise", "an exception in a step", "raise", True),
    "step-hang": _fault("step-hang", "a native hang in a step, without the interpreter's lock", "hang", False),
    "step-hang-gil": _fault("step-hang-gil", "a native hang in a step, with the interpreter's lock", "hang-gil", False),
    "step-delay": _fault("step-delay", "a step that takes so much longer", "delay:{ms}", True, ms=200),
}
