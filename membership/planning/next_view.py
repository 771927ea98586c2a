"""The view that follows the present one, given its members: who keeps, loads and drops what. Pure."""

from __future__ import annotations

from membership.placement.plan import coverage, plan, repair
from membership.planning.cluster_facts import Census
from membership.planning.rebalance import loads_of
from membership.store.records import Member, Placement, View


def next_view(census: Census, members: tuple[Member, ...], *, bare: bool = False) -> View:
    """The next epoch with these members. `bare`: nobody loads anything, if what members hold covers all experts.

    After a loss its members load the orphans only: redundancy is restored by those who come, or in the background.
    """
    old = {m.rank: census.view.placement[m.rank] for m in members if m in census.members}
    config, nodes = census.config, {m.rank: m.node for m in members}
    lost = len(old) == len(members) and census.members != census.alive
    if lost or (bare and len(old) == len(members) and covers(census, old)):
        placement = repair(config.moe_layers, config.experts, old)
    else:
        loads = loads_of(config, census.state.expert_load)
        placement = plan(config.moe_layers, config.experts, nodes, config.redundancy, old, loads, nodes)
    ordered = tuple(sorted(members, key=lambda m: m.rank))
    alive = {m.rank: census.view.placement[m.rank] for m in census.alive}
    urgent = not covers(census, alive)
    return View(epoch=census.view.epoch + 1, members=ordered, placement=placement, urgent=urgent)


def covers(census: Census, placement: Placement) -> bool:
    """Whether the placement has a holder for every expert."""
    return coverage(placement, placement, census.config.experts).min_live_replicas >= 1
