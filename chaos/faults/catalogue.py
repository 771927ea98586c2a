"""The catalogue: all faults by name. Each file of injectors has a table of its own; here they are put together."""

from __future__ import annotations

from chaos.faults import checkpoint, clock, cuts, disk, ipc, oom, parent, proxied, signals, step, store
from chaos.faults.base import Fault, Injector, NotInjected, Params, Site

__all__ = ["FAULTS", "Fault", "injector"]

_MODULES = (signals, oom, step, parent, ipc, disk, checkpoint, clock, store, proxied, cuts)

FAULTS: dict[str, Fault] = {name: fault for module in _MODULES for name, fault in module.FAULTS.items()}


def injector(name: str, site: Site, victim: str, params: Params | None = None) -> Injector:
    """An injector for the fault of this name; NotInjected if there is none, or if it does not fit the victim."""
    if name not in FAULTS:
        raise NotInjected(f"there is no fault {name!r}", hint=f"there are {', '.join(FAULTS)}")
    return FAULTS[name].injector(site, victim, params)
