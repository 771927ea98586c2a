"""What an entry of the catalogue is (`chaos/faults/catalogue.py`): a fault that can be dealt, to whom, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chaos.faults.base import Injector, NotInjected, Site

Params = Mapping[str, Any]
Make = Callable[[Site, str, Params], Injector]

ROLES = ("gateway", "engine", "engine-standby", "controller", "agent")
PROCESSES = (*ROLES, "rank", "etcd", "supervisor", "forkserver")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault. `injector` makes what deals it, once."""

    about: str  # one line for people
    victims: tuple[str, ...]  # roles, "rank" for "rank N", or what else it befalls: "state-dir", "store", …
    heals: bool  # whether `heal` gives the victim back; of others the product has to make a new one
    make: Make
    needs: tuple[str, ...] = ()  # of the machine or the cluster, in words: "root", "--chaos", …
    params: Params = field(default_factory=dict)  # what may be given, with what it is otherwise

    def fits(self, victim: str) -> bool:
        """Whether it can befall this victim."""
        return victim.partition(" ")[0] in self.victims

    def injector(self, site: Site, victim: str, params: Params | None = None) -> Injector:
        """What deals it to `victim`; NotInjected if it does not fit, or if there is no such parameter."""
        if not self.fits(victim):
            raise NotInjected(f"{victim} is no victim of this fault", hint=f"it befalls {', '.join(self.victims)}")
        unknown = sorted(set(params or {}) - set(self.params))
        if unknown:
            known = ", ".join(self.params) or "none"
            raise NotInjected(f"no such parameter: {', '.join(unknown)}", hint=f"parameters of this fault: {known}")
        return self.make(site, victim, {**self.params, **(params or {})})
