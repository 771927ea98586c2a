"""Faults of ranks that are on another machine: dealt by a failpoint in the rank's own step, seen in the history."""

from __future__ import annotations

import time

from chaos.inject.base import Injected, NotInjected, Site
from chaos.inject.fault import Params
from membership.failpoints import KIND

POINT = "rank.step"
SEEN_S = 15.0  # a rank steps only while there are requests
POLL_S = 0.02
ACTIONS = {  # of the catalogue's faults, those that a failpoint deals just as well
    "kill": "1*kill",
    "segv": "1*segv",
    "raise": "1*raise",
    "hang": "hang",
    "hang-gil": "hang-gil",
}


def unable_remotely(fault: str, victim: str) -> str:
    """Why this fault cannot be dealt from afar; "" if it can."""
    if not victim.startswith("rank "):
        return f"{victim} is on another machine; only ranks can be struck from afar, or give --state-dir"
    if fault not in ACTIONS:
        return f"{fault} needs its machine; from afar there are {', '.join(ACTIONS)}"
    return ""


class AtStep:
    """One fault of one rank, in the middle of its next step."""

    def __init__(self, fault: str, site: Site, victim: str, params: Params) -> None:
        self.fault, self._site, self.victim = fault, site, victim
        if why := unable_remotely(fault, victim):
            raise NotInjected(why)
        self.lasting = not ACTIONS[fault].startswith("1*")

    def inject(self) -> Injected:
        """Arm it, and wait until the rank says that it passes; disarmed again if it does not."""
        rank = int(self.victim.split()[1])
        known, at = len(self._site.events()), time.time()
        self._site.arm(f"{POINT}@{rank}={ACTIONS[self.fault]}")
        deadline = time.monotonic() + SEEN_S
        while True:
            for event in self._site.events()[known:]:
                if event.kind == KIND and event.rank == rank and event.fields.get("name") == POINT:
                    if not self.lasting:  # it would be dealt once more if something else were armed besides
                        self.heal()
                    return Injected(
                        fault=self.fault, victim=self.victim, at=at, seen_at=time.time(),
                        pid=event.fields.get("pid", 0),
                        proof=f"the history says that it came to {POINT} and was dealt {event.fields['action']}",
                    )  # fmt: skip
            if time.monotonic() > deadline:
                self.heal()
                raise NotInjected(f"{self.victim} did not come to {POINT} within {SEEN_S:g} s; are there requests?")
            time.sleep(POLL_S)

    def heal(self) -> None:
        """Disarm it."""
        self._site.arm("")
