"""How much of a running deployment a scenario may hurt. Pure: what is refused, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from chaos.scenarios.victims import number_of
from membership.placement.plan import coverage
from membership.store.records import Placement

HARMLESS = ("rank", "controller", "engine", "engine-standby")  # their death loses no request: a successor goes on
FOR_EVER = ("supervisor",)  # nothing starts these again


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The blast radius."""

    max_ranks_down: int = 1
    allow_uncovered: bool = False
    only_roles: tuple[str, ...] = HARMLESS
    max_unready_s: float = 10.0
    max_seconds: float = 600.0


def unfit(status: Mapping[str, Any]) -> str:
    """Why nothing may be done to a deployment in this state; "" if it may."""
    missing = [f"rank {each['rank']} is {each['state']}" for each in status["ranks"] if each["state"] != "serving"]
    if status.get("store"):
        return f"its store is in trouble: {status['store']}"
    if status["state"] != "serving":
        return f"it is {status['state']}{': ' if missing else ''}{', '.join(missing)}; wait until it serves"
    if missing or len(status["ranks"]) != status["desired"]:
        has = ", ".join(missing) or f"it has {len(status['ranks'])} ranks"
        return f"it is not whole ({has}, wanted {status['desired']}); wait until it is"
    if status.get("operation"):
        return f"operation {status['operation']['id']} ({status['operation']['what']}) is active; wait for its end"
    if status.get("pause"):
        return f"{status['pause']['words']}; end the pause first: elastic resume"
    return ""


def too_much(victims: Sequence[str], down: Collection[int], placement: Placement, limits: Limits) -> str:
    """Why these victims may not have faults together while the ranks in `down` are down; "" if they may."""
    for victim in victims:
        role = victim.partition(" ")[0]
        if role in FOR_EVER:
            return f"nothing would start the {role} again; a scenario with it needs a cluster of its own (no --target)"
        if role not in limits.only_roles:
            allowed = ",".join((*limits.only_roles, role))
            return f"{victim} is not among the roles that may have faults; to allow it: --only-roles {allowed}"
    numbers = [number_of(victim) for victim in victims]
    hit = {number for number in numbers if number is not None}
    if "agent" in victims:  # its ranks die with it
        hit |= set(placement)
    others = sum(victim.startswith("rank ") and number_of(victim) is None for victim in victims)
    gone = hit | set(down)
    count = len(gone) + others
    if hit or others:
        if count > limits.max_ranks_down:
            named = f" ({', '.join(map(str, sorted(gone)))})" if gone else ""
            return (
                f"{count} ranks would be down at a time{named}, and {limits.max_ranks_down} may; "
                f"wait until whole before it, or allow it: --max-ranks-down {count}"
            )
        lost = len(coverage(placement, set(placement) - gone).uncovered)
        if lost and not limits.allow_uncovered:
            return (
                f"{lost} (layer, expert) pairs would have no live replica, and requests would wait; "
                "choose other ranks or more redundancy, or allow it: --allow-uncovered"
            )
    return ""
