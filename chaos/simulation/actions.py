"""What operators and clients do with a simulated cluster. These are no faults and are not counted as such.

As in `faults.py` each returns a sentence about what it did, or "" if there was nothing to do.
"""

from __future__ import annotations

from contextlib import suppress
from random import Random

from chaos.simulation.cluster import Cluster
from chaos.simulation.faults import NOTHING, Action
from membership.base.errors import ElasticError, OperationConflict, PlanRefused, StoreError
from membership.operations.change import drain, scale, undrain
from membership.operations.operations import cancel, propose
from membership.operations.pause import pause
from membership.operations.quarantine import unquarantine

ACTIONS: dict[str, Action] = {}


def action(function: Action) -> Action:
    """Register it. The function's name is its kind."""
    ACTIONS[function.__name__.replace("_", "-")] = function
    return function


@action
def change(cluster: Cluster, random: Random) -> str:
    """Scale, drain or undrain, as far as it is possible."""
    state, some = cluster.store.state, random.randint(1, 2)
    desired = state.desired
    request = scale(random.randint(1, 6))
    timeout_s = random.choice([0.5, 5.0, 60.0])
    if desired is None or state.view is None:
        return NOTHING
    if random.random() < 0.4 and len(desired.slots) > some:
        request = drain(*random.sample(desired.slots, some))
    elif desired.cordoned and random.random() < 0.7:
        request = undrain(random.choice(desired.cordoned))
    wall = cluster.gateway.wall
    try:
        name = f"op{random.randrange(1 << 30)}"
        propose(cluster.gateway.client, cluster.keys.cluster, request, op_id=name, timeout_s=timeout_s, clock=wall)
    except (OperationConflict, PlanRefused, StoreError):
        return NOTHING
    return f"an operator asks for {request} within {timeout_s:g} s"


@action
def call_off(cluster: Cluster, random: Random) -> str:
    """Cancel the operation under way."""
    active = cluster.store.state.active
    if active is None:
        return NOTHING
    with suppress(ElasticError):
        cancel(cluster.gateway.client, cluster.keys.cluster, active.id, "operator")
        return f"an operator cancels {active.id}"
    return NOTHING


@action
def halt(cluster: Cluster, random: Random) -> str:
    """A pause of planned changes."""
    ttl_s = random.choice([1.0, 20.0])
    with suppress(StoreError):
        pause(cluster.gateway.client, cluster.keys.cluster, ttl_s, clock=cluster.gateway.wall)
        return f"an operator pauses changes for {ttl_s:g} s"
    return NOTHING


@action
def leave(cluster: Cluster, random: Random) -> str:
    """SIGTERM of an agent."""
    host = cluster.hosts[random.choice(cluster.nodes)]
    return f"{host.name} is asked to leave" if host.alive and host.leave() else NOTHING


@action
def pardon(cluster: Cluster, random: Random) -> str:
    """End a quarantine."""
    aside = [slot for slot, last in cluster.store.state.exits.items() if last.quarantined]
    with suppress(ElasticError):
        if aside:
            slot = random.choice(sorted(aside))
            unquarantine(cluster.gateway.client, cluster.keys.cluster, slot, clock=cluster.gateway.wall)
            return f"an operator ends the quarantine of rank {slot}"
    return NOTHING


@action
def hang_up(cluster: Cluster, random: Random) -> str:
    """A client goes away."""
    waiting = cluster.gateway.open
    if not waiting:
        return NOTHING
    name = random.choice(waiting)
    cluster.gateway.abort(name)
    return f"the client of {name} goes away"
