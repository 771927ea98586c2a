"""Faults of ranks that are on another machine: dealt by a failpoint in the rank's own step, seen in the history."""

from __future__ import annotations

from chaos.faults import step
from chaos.faults.base import Injector, NotInjected, Params, Site

ACTIONS = {"kill": "kill", "segv": "segv"}  # of the faults by a signal, those that a failpoint deals just as well
FAULTS = (*ACTIONS, *step.FAULTS)


def unable_remotely(fault: str, victim: str) -> str:
    """Why this fault cannot be dealt from afar; "" if it can."""
    if not victim.startswith("rank "):
        return f"{victim} is on another machine; only ranks can be struck from afar, or give --state-dir"
    if fault not in FAULTS:
        return f"{fault} needs its machine; from afar there are {', '.join(FAULTS)}"
    return ""


def injector(fault: str, site: Site, victim: str, params: Params) -> Injector:
    """What deals it in the middle of the rank's next step; NotInjected if that cannot be done."""
    if why := unable_remotely(fault, victim):
        raise NotInjected(why)
    if fault in ACTIONS:
        return step.AtStep(fault, ACTIONS[fault], site, victim, {"times": 1})
    return step.FAULTS[fault].injector(site, victim, params)
