"""The next view, given its members: what each of them keeps, loads and drops. Pure."""

from __future__ import annotations

from membership.placement.plan import plan, repair
from membership.placement.tally import held_in, replicas_of
from membership.planning.cluster_facts import ClusterFacts
from membership.planning.rebalance import loads_of
from membership.store.records import Member, Placement, View


def next_view(facts: ClusterFacts, members: tuple[Member, ...], *, bare: bool = False) -> View:
    """Return the view of the next epoch. `bare`: nothing is loaded if what the members hold covers all experts.

    After a loss members load orphaned experts only. Redundancy comes back with new ranks, or in the background.
    """
    present = set(facts.members)
    old = {m.rank: facts.view.placement[m.rank] for m in members if m in present}
    config, nodes = facts.config, facts.domains(members)
    lost = len(old) == len(members) and facts.members != facts.alive
    if lost or (bare and len(old) == len(members) and covers(facts, old)):
        placement = repair(config.moe_layers, config.experts, old)
    else:
        loads = loads_of(config, facts.state.expert_load)
        placement = plan(config.moe_layers, config.experts, nodes, config.redundancy, old, loads, nodes)
    ordered = tuple(sorted(members, key=lambda m: m.rank))
    alive = {m.rank: facts.view.placement[m.rank] for m in facts.alive}
    urgent = not covers(facts, alive)
    return View(epoch=facts.view.epoch + 1, members=ordered, placement=placement, urgent=urgent)


def covers(facts: ClusterFacts, placement: Placement) -> bool:
    """Whether each expert has a holder in the placement."""
    found = held_in(sorted(placement), placement)
    return bool(replicas_of(found, facts.config.moe_layers, facts.config.experts).all())
