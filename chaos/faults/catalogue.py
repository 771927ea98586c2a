"""All faults that can be dealt, by name. Each file of injectors has a table of its own; here they are put together."""

from __future__ import annotations

from chaos.faults import checkpoint, clock, cuts, disk, ipc, oom, parent, proxied, signals, step, store
from chaos.faults.base import Injector, NotInjected, Site
from chaos.faults.fault import Fault, Params

__all__ = ["FAULTS", "Fault", "injector"]

FAULTS: dict[str, Fault] = {
    **signals.FAULTS,
    **oom.FAULTS,
    **step.FAULTS,
    **parent.FAULTS,
    **ipc.FAULTS,
    **disk.FAULTS,
    **checkpoint.FAULTS,
    **clock.FAULTS,
    **store.FAULTS,
    **proxied.FAULTS,
    **cuts.FAULTS,
}


def injector(name: str, site: Site, victim: str, params: Params | None = None) -> Injector:
    """What deals the fault of this name; NotInjected if there is none, or if it does not befall the victim."""
    if name not in FAULTS:
        raise NotInjected(f"there is no fault {name!r}", hint=f"there are {', '.join(FAULTS)}")
    return FAULTS[name].injector(site, victim, params)
