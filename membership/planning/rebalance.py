"""The background rebalance: when a quiet cluster should move experts, and which. Redundancy first, then balance. Pure.

After a loss ranks load orphaned experts only. The rest comes back here, one byte budget at a time, while serving goes
on. To avoid flapping, there is a rest after each view, load is balanced only if imbalance is large and can be reduced
clearly, and loads are averaged over a long window. A rebalance that needs several views marks each of them
`unfinished`, and is completed. A request (`operations/rebalance_now.py`) skips the rest.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from membership.base.timing import BALANCE_REST_S, REQUEST_VALID_S, RESTORE_REST_S
from membership.placement.balance import balanced, cut, imbalance, search
from membership.placement.local_search import EVEN
from membership.placement.plan import Loads, max_ranks_allowed, plan
from membership.placement.tally import Domain, held_in, levels_of, tally
from membership.planning.cluster_facts import ClusterFacts
from membership.store.records import ClusterConfig, ExpertLoad, Placement

UNEVEN = 1.3  # rebalance if the imbalance is above this
BETTER = 0.9  # and only if that of the worst layers would fall to at most this part of it
SEARCHED = 640  # slots of the layers that one step is looked for in: a large model's layers take a byte budget each
GOING_ON = 0.99  # the same for a rebalance that is unfinished or requested


class Rebalance(NamedTuple):
    """A better placement of the same members. `at`: when it may be staged; `unfinished`: another step will follow."""

    placement: Placement
    at: float
    reason: str
    unfinished: bool = False


def loads_of(config: ClusterConfig, record: ExpertLoad | None) -> Loads | None:
    """Return the measured loads, if there are any and they fit this model."""
    if record is None or len(record.loads) != config.moe_layers:
        return None
    return record.loads if all(len(layer) == config.experts for layer in record.loads) else None


def rebalance(facts: ClusterFacts) -> Rebalance | None:
    """Return the next step to a better placement within one change's byte budget; None if there is none."""
    if not facts.config.rebalance_bytes or not facts.members:
        return None
    placement = facts.view.placement
    request = facts.state.rebalance
    asked = request is not None and facts.view.staged < request.at and facts.now < request.at + REQUEST_VALID_S
    problem = _Problem(
        facts.config, tuple(sorted(facts.domains(facts.members).items())), tuple(sorted(placement.items())),
        facts.state.expert_load,
        facts.view.unfinished or asked, placement,
    )  # fmt: skip
    found = _better(problem)
    if found is None:
        return None
    return found._replace(at=0.0 if asked else facts.view.staged + found.at)


@dataclass(frozen=True)
class _Problem:
    """Everything that the answer depends on: the key of its cache, since it is asked often and seldom changes."""

    config: ClusterConfig
    domains: tuple[tuple[int, Domain], ...]
    key: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]
    record: ExpertLoad | None
    begun: bool
    placement: Placement = field(compare=False)

    @property
    def nodes(self) -> dict[int, Domain]:
        """rank -> its failure domain."""
        return dict(self.domains)


@lru_cache(maxsize=4)
def _better(problem: _Problem) -> Rebalance | None:
    """The step, with `at` in seconds from when the view was staged."""
    config, now, nodes = problem.config, problem.placement, problem.nodes
    loads = loads_of(config, problem.record)
    most = config.rebalance_bytes // config.expert_bytes if config.expert_bytes else sys.maxsize
    strength = _strength(problem, now)
    if not strength.most:
        whole = plan(config.moe_layers, config.experts, now, config.redundancy, now, loads, nodes)
        if any(b > a for a, b in zip(strength.counts, _strength(problem, whole).counts, strict=True)):
            step = cut(now, whole, config.moe_layers, config.experts, most)
            return Rebalance(step, RESTORE_REST_S, "redundancy is restored", unfinished=True) if step != now else None
    if loads is None or (uneven := imbalance(now, loads)) <= (EVEN if problem.begun else UNEVEN):
        return None
    found = search(now, loads, nodes, config.redundancy, slots=SEARCHED)
    if found.reached > (GOING_ON if problem.begun else BETTER) * found.before:
        return None
    step = found.after(most) if most > 1 else balanced(now, loads, nodes, config.redundancy, most)
    after = imbalance(step, loads)
    if after >= uneven:
        return None
    words = f"load is balanced, imbalance {uneven:.2f} -> {after:.2f}"
    return Rebalance(step, BALANCE_REST_S, words, found.moves > most or found.others())


class _Strength(NamedTuple):
    """What a placement survives. `counts`: replicas that count towards redundancy, experts in two or more zones, on two
    or more machines, slots in use; of zones if there are several. `most`: no plan of these ranks could be stronger,
    whatever the loads are; so none need be made."""

    counts: tuple[int, ...]
    most: bool


def _strength(problem: _Problem, placement: Placement) -> _Strength:
    config, order = problem.config, sorted(placement)
    now = tally(
        held_in(order, placement), np.ones((config.moe_layers, config.experts)), levels_of(order, problem.nodes)
    )
    whole = min(int(config.redundancy), len(order))
    slots = min(max_ranks_allowed(config.experts, config.redundancy), config.experts * len(order))
    apart = [(has > 0).sum(axis=1) > 1 for has in now.within]
    levels = zip(now.within, apart, strict=True)
    spread = all(has.shape[1] == 1 or bool((two | (now.total < 2)).all()) for has, two in levels)
    most = spread and bool((now.total >= whole).all()) and int(now.size.sum()) >= slots * config.moe_layers
    counts = (int(np.minimum(now.total, whole).sum()), *(int(two.sum()) for two in apart), int(now.size.sum()))
    return _Strength(counts, most)
