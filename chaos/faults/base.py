"""What every injector is: it deals one fault to one victim, proves that it happened, and takes it back.

A fault that cannot be proven is no fault: `inject` raises NotInjected, and whoever counts faults counts nothing.
`heal` may be called at any time and more than once; after it nothing of the fault is left but its consequences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from membership.base.errors import ElasticError
from membership.base.events import Event


class NotInjected(ElasticError):
    """The fault was not dealt, or was not seen to have happened: nothing may be concluded from what follows."""


class Injected(msgspec.Struct, frozen=True, kw_only=True):
    """A fault that was seen to happen. Times are `time.time()` seconds."""

    fault: str  # its name in the catalogue
    victim: str  # "rank 2", a role's name, "etcd", "disk", …
    at: float  # when it was dealt
    seen_at: float  # when it was seen to have taken effect
    proof: str  # how that is known, in words for a report: "/proc says stopped", "pidfd says gone", …
    pid: int = 0  # of the victim, if it is a process


class Injector(Protocol):
    """One fault for one victim. Make a new one for each time."""

    def inject(self) -> Injected:
        """Deal it and see that it happened; NotInjected if it did not."""

    def heal(self) -> None:
        """Take back what can be taken back (a dead process stays dead); NotInjected if that fails."""


class Site(Protocol):
    """What injectors may know of a cluster. `chaos.faults.site` has the one for a cluster on this machine."""

    def pid(self, victim: str) -> int:
        """Process id of "rank 2", "engine" (the one in office), "engine-standby", "gateway", "controller", "agent",
        "etcd", "supervisor" or "forkserver"; NotInjected if there is none now."""

    def arm(self, failpoints: str) -> None:
        """Have all processes pass these failpoints from now on (`membership/base/failpoints.py`); "" disarms them."""

    def events(self) -> list[Event]:
        """The cluster's history so far."""

    def state_dir(self) -> Path:
        """Its state directory."""

    def url(self) -> str:
        """Base URL of its API."""
