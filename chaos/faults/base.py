"""What every fault has: an entry in the catalogue, an injector, and the site that the injector works on.

A fault that cannot be proven does not count: `inject` raises NotInjected, and nothing may be concluded from the run.
`heal` may be called at any time and more than once; after it only the consequences of the fault are left.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from membership.base.errors import ElasticError
from membership.base.events import Event

SEEN_S = 5.0  # a fault that is not seen within this time has not happened
OBEYED_S = 30.0  # a signal that stops or ends: on a busy machine, or in a call that the disk holds up, it takes long
POLL_S = 0.002

ROLES = ("gateway", "engine", "engine-standby", "controller", "agent")
PROCESSES = (*ROLES, "rank", "etcd", "supervisor", "forkserver")

Params = Mapping[str, Any]
T = TypeVar("T")


class NotInjected(ElasticError):
    """The fault was not injected, or was not seen to take effect: nothing may be concluded from what follows."""


class Injected(msgspec.Struct, frozen=True, kw_only=True):
    """A fault that was seen to happen. Times are `time.time()` seconds."""

    fault: str  # its name in the catalogue
    victim: str  # "rank 2", a role's name, "etcd", "disk", …
    at: float  # when it was injected
    seen_at: float  # when it was seen to have taken effect
    proof: str  # how that is known, for a report: "/proc says stopped", "pidfd says gone", …
    pid: int = 0  # of the victim, if it is a process


class Site(Protocol):
    """What injectors may know of a cluster. `chaos.faults.site` has the one for a cluster on this machine."""

    def pid(self, victim: str) -> int:
        """Process id of "rank 2", "engine" (the one in office), "engine-standby", "gateway", "controller", "agent",
        "etcd", "supervisor" or "forkserver"; NotInjected if there is none now."""

    def arm(self, failpoints: str) -> None:
        """Arm these failpoints in all processes (`membership/base/failpoints.py`); "" disarms them."""

    def events(self) -> list[Event]:
        """The cluster's history so far."""

    def state_dir(self) -> Path:
        """Its state directory."""

    def url(self) -> str:
        """Base URL of its API."""


class Injector(ABC):
    """Injects one fault into one victim, once. Subclasses implement `_inject` and, if it can be undone, `_heal`."""

    fault = ""  # its name in the catalogue

    def __init__(self, victim: str) -> None:
        self.victim = victim
        self._active = False
        self._pid, self._seen_at = 0, 0.0  # for `Injected`; 0.0: it took effect when `_inject` returned

    def inject(self) -> Injected:
        """Inject the fault and see that it happened; otherwise NotInjected, and nothing of it is left."""
        self._prepare()
        at, self._active = time.time(), True
        try:
            proof = self._inject()
        except BaseException:
            self.heal()
            raise
        return Injected(
            fault=self.fault, victim=self.victim, at=at, seen_at=self._seen_at or time.time(), proof=proof,
            pid=self._pid,
        )  # fmt: skip

    def heal(self) -> None:
        """Undo what can be undone (a dead process stays dead); NotInjected if that fails."""
        if self._active:
            self._heal()
            self._active = False

    def _prepare(self) -> None:  # noqa: B027 - most faults need nothing
        """Check that the fault can be injected as things are; NotInjected if not. Nothing is changed yet."""

    @abstractmethod
    def _inject(self) -> str:
        """Inject the fault and wait until it is seen; returns the proof. NotInjected if it is not seen."""

    def _heal(self) -> None:  # noqa: B027 - many faults cannot be undone
        """Undo the fault, which may have been injected in part only."""


class SiteInjector(Injector):
    """An injector that looks up its victim on a site."""

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        super().__init__(victim)
        self.site, self.params = site, params


Make = Callable[[Site, str, Params], Injector]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One entry of the catalogue."""

    about: str  # one line for people
    victims: tuple[str, ...]  # roles, "rank" for "rank N", or other targets: "state-dir", "store", …
    heals: bool  # whether `heal` gives the victim back; if not, the product has to replace it
    make: Make
    needs: tuple[str, ...] = ()  # what the machine or cluster must offer, in words: "root", "--chaos", …
    params: Params = field(default_factory=dict)  # accepted parameters with their defaults

    def fits(self, victim: str) -> bool:
        """Whether it can be injected into this victim."""
        return victim.partition(" ")[0] in self.victims

    def injector(self, site: Site, victim: str, params: Params | None = None) -> Injector:
        """An injector for `victim`; NotInjected if the victim does not fit or a parameter is unknown."""
        if not self.fits(victim):
            raise NotInjected(f"{victim} is no victim of this fault", hint=f"its victims: {', '.join(self.victims)}")
        unknown = sorted(set(params or {}) - set(self.params))
        if unknown:
            known = ", ".join(self.params) or "none"
            raise NotInjected(f"no such parameter: {', '.join(unknown)}", hint=f"parameters of this fault: {known}")
        return self.make(site, victim, {**self.params, **(params or {})})


I = TypeVar("I", bound=type[SiteInjector])  # noqa: E741


class Faults(dict[str, Fault]):
    """A part of the catalogue: name -> entry."""

    def entry(
        self,
        name: str,
        about: str,
        *,
        victims: tuple[str, ...],
        heals: bool,
        needs: tuple[str, ...] = (),
        params: Params | None = None,
    ) -> Callable[[I], I]:
        """Enters the injector below it under this name."""

        def register(make: I) -> I:
            make.fault = name
            self[name] = Fault(about=about, victims=victims, heals=heals, make=make, needs=needs, params=params or {})
            return make

        return register


def poll(ask: Callable[[], T], within_s: float, every_s: float = POLL_S) -> T:
    """Ask until the answer is true or the time is over; returns the last answer."""
    deadline = time.monotonic() + within_s
    while not (answer := ask()) and time.monotonic() <= deadline:
        time.sleep(every_s)
    return answer


def see(
    ask: Callable[[], T | None], what: str, within_s: float = SEEN_S, *, every_s: float = POLL_S, hint: str = ""
) -> T:
    """Wait for the sign of a fault; NotInjected names `what` was not seen."""
    if not (answer := poll(ask, within_s, every_s)):
        raise NotInjected(f"not seen within {within_s:g} s: {what}", hint=hint)
    return answer
