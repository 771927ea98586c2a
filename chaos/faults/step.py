"""Faults inside a rank's step, by failpoints: it raises, hangs (with or without the interpreter's lock), or is late;
its device fails for good, lacks memory, or does not end what was launched. The last three are the same on a CPU, but
for the device.

The cluster must be served with --chaos. Proof is the event `failpoint`, which a process writes before it fails.
"""

from __future__ import annotations

from functools import partial

from chaos.faults.base import Fault, Faults, Params, Site, SiteInjector, see
from membership.base.events import Event
from membership.base.failpoints import KIND

POINT, LAUNCHED = "rank.step", "rank.launched"
SEEN_S = 15.0  # a rank makes a step only if there are requests
POLL_S = 0.02

FAULTS = Faults()


class AtStep(SiteInjector):
    """One failpoint at `rank.step` of one rank; healing disarms it, and a hung step goes on."""

    def __init__(self, fault: str, point: str, action: str, site: Site, victim: str, params: Params) -> None:
        """`action`: what the failpoint `point` does; it may name parameters, as in `delay:{ms}`."""
        super().__init__(site, victim, params)
        self.fault, self._point = fault, point
        numbers = {name: int(value) for name, value in params.items()}
        self._action = (f"{numbers['times']}*" if numbers["times"] else "") + action.format(**numbers)

    def _inject(self) -> str:
        rank = int(self.victim.split()[1])
        known = len(self.site.events())
        self.site.arm(f"{self._point}@{rank}={self._action}")
        failed = see(
            lambda: self._failed(rank, known), f"{self.victim} at {self._point}", SEEN_S, every_s=POLL_S,
            hint="it makes steps only under load",
        )  # fmt: skip
        self._seen_at, self._pid = failed.ts, int(failed.fields["pid"])
        return f"event {KIND} in the history: {self._point} {failed.fields['action']}"

    def _heal(self) -> None:
        self.site.arm("")

    def _failed(self, rank: int, known: int) -> Event | None:
        """The event of the failpoint, in the history after the first `known` events."""
        for event in self.site.events()[known:]:
            if event.kind == KIND and event.fields["name"] == self._point and event.rank == rank:
                return event
        return None


def _enter(name: str, about: str, action: str, point: str = POINT, *, heals: bool, **params: float) -> None:
    FAULTS[name] = Fault(
        about=about, victims=("rank",), heals=heals, make=partial(AtStep, name, point, action), needs=("--chaos",),
        params={"times": 1, **params},
    )  # fmt: skip


_enter("step-raise", "an exception in a step", "raise", heals=True)
_enter("step-hang", "a native hang in a step, without the interpreter's lock", "hang", heals=False)
_enter("step-hang-gil", "a native hang in a step, with the interpreter's lock", "hang-gil", heals=False)
_enter("step-delay", "a step that takes `ms` milliseconds longer", "delay:{ms}", heals=True, ms=200)
_enter("launch-hang", "a native hang once a step's kernels run, as if one did not end", "hang", LAUNCHED, heals=False)
_enter("crash-device", "its device fails for good in a step, as at an Xid", "lose-device", LAUNCHED, heals=False)
_enter("device-oom", "its device lacks memory for a step twice in a row", "fill-device", LAUNCHED, heals=False, times=2)
