"""When a quiet cluster is worth moving experts in the background, and which: redundancy first, then balance. Pure.

After a loss ranks load orphans only; what else is missing comes back here, a byte budget at a time, while steps go on.
It must not flap: after each view there is a rest, balance is left alone until it is clearly bad and can get clearly
better, and loads are those of a long window. What was begun is finished: a view that is a step on the way says so, also
when redundancy was restored and balance has yet to follow. Who asks (`operations/rebalance_now.py`) need not wait.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from membership.base.timing import BALANCE_REST_S, REQUEST_VALID_S, RESTORE_REST_S
from membership.placement.balance import balanced, cut, imbalance
from membership.placement.local_search import EVEN
from membership.placement.plan import Loads, held_by, host_numbers, plan
from membership.planning.cluster_facts import ClusterFacts
from membership.store.records import ClusterConfig, ExpertLoad, Member, Placement

UNEVEN = 1.3  # imbalance above which something is done
BETTER = 0.9  # of which at most this much must be left once all is done
GOING_ON = 0.99  # the same, once begun or asked for


class Rebalance(NamedTuple):
    """A better placement of the same members, when it may be staged, what it is for, whether more is to come."""

    placement: Placement
    at: float
    reason: str
    unfinished: bool = False


def loads_of(config: ClusterConfig, record: ExpertLoad | None) -> Loads | None:
    """The measured loads, if there are any and they are of this model."""
    if record is None or len(record.loads) != config.moe_layers:
        return None
    return record.loads if all(len(layer) == config.experts for layer in record.loads) else None


def rebalance(facts: ClusterFacts) -> Rebalance | None:
    """The next step to a better placement, as far as one change's budget goes; None if there is none."""
    if not facts.config.rebalance_bytes or not facts.members:
        return None
    placement = facts.view.placement
    request = facts.state.rebalance
    asked = request is not None and facts.view.staged < request.at and facts.now < request.at + REQUEST_VALID_S
    problem = _Problem(
        facts.config, facts.members, tuple(sorted(placement.items())), facts.state.expert_load,
        facts.view.unfinished or asked, placement,
    )  # fmt: skip
    found = _better(problem)
    if found is None:
        return None
    return found._replace(at=0.0 if asked else facts.view.staged + found.at)


@dataclass(frozen=True)
class _Problem:
    """All that the answer depends on: it is asked for at every look, and seldom changes."""

    config: ClusterConfig
    members: tuple[Member, ...]
    key: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]
    record: ExpertLoad | None
    begun: bool
    placement: Placement = field(compare=False)

    @property
    def nodes(self) -> dict[int, str]:
        """rank -> its host."""
        return {member.rank: member.node for member in self.members}


@lru_cache(maxsize=4)
def _better(problem: _Problem) -> Rebalance | None:
    """The answer, with `at` counted from when the view was staged."""
    config, now, nodes = problem.config, problem.placement, problem.nodes
    loads = loads_of(config, problem.record)
    most = config.rebalance_bytes // config.expert_bytes if config.expert_bytes else sys.maxsize
    whole = plan(config.moe_layers, config.experts, now, config.redundancy, now, loads, nodes)
    if any(b > a for a, b in zip(_strength(problem, now), _strength(problem, whole), strict=True)):
        step = cut(now, whole, config.moe_layers, config.experts, most)
        return Rebalance(step, RESTORE_REST_S, "redundancy is restored", unfinished=True) if step != now else None
    if loads is None or (uneven := imbalance(now, loads)) <= (EVEN if problem.begun else UNEVEN):
        return None
    goal = balanced(now, loads, nodes, config.redundancy, sys.maxsize)
    if imbalance(goal, loads) > (GOING_ON if problem.begun else BETTER) * uneven:
        return None
    step = balanced(now, loads, nodes, config.redundancy, most)
    if imbalance(step, loads) >= uneven:
        return None
    words = f"load is evened out, imbalance {uneven:.2f} -> {imbalance(step, loads):.2f}"
    return Rebalance(step, BALANCE_REST_S, words, step != goal)


def _strength(problem: _Problem, placement: Placement) -> tuple[int, int, int]:
    """Replicas that redundancy asks for, experts on two hosts or more, slots in use."""
    config, order = problem.config, sorted(placement)
    holds = held_by(config.moe_layers, config.experts, order, placement)
    hosts = host_numbers(order, problem.nodes)
    whole = min(int(config.redundancy), len(order))
    there = np.array([holds[:, hosts == host].any(axis=1) for host in range(int(hosts.max()) + 1)])
    return (
        int(np.minimum(holds.sum(axis=1), whole).sum()),
        int((there.sum(axis=0) > 1).sum()),
        int(holds.sum()),
    )
