"""Row of `scaling.py` for the planner alone, at the size of the largest open models. No process, no network."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from msgspec.structs import replace

from benchmarks.recovery_report import Report, say
from membership.base.errors import ElasticError
from membership.placement.balance import imbalance
from membership.placement.plan import Loads, coverage, moves, plan, repair
from membership.planning.cluster_facts import ClusterFacts
from membership.planning.rebalance import rebalance
from membership.store.records import ClusterConfig, ClusterState, ExpertLoad, Member, Placement, View

LAYERS, EXPERTS, RANKS, HOSTS = 58, 256, 64, 8
REDUNDANCY = 1.25  # 320 slots a layer
SPREAD = 0.5  # sigma of the lognormal loads: the busiest of 256 experts has some 4 times the mean
EXPERT_BYTES = 44 << 20  # 3 matrices of 7168 x 2048 in fp8
NODES = {rank: f"host-{rank // (RANKS // HOSTS)}" for rank in range(RANKS)}
Made = TypeVar("Made")


def some_loads(seed: int) -> tuple[tuple[int, ...], ...]:
    """As the engine publishes them: 16ths of the layer's mean."""
    raw = np.random.default_rng(seed).lognormal(0.0, SPREAD, (LAYERS, EXPERTS))
    published = np.rint(16 * raw / raw.mean(axis=1, keepdims=True)).astype(int)
    return tuple(tuple(layer) for layer in published.tolist())


def timed(into: list[float], call: Callable[[], Made]) -> Made:
    """Do it, and note the milliseconds of processor time: one thread computes, and others' work is not its."""
    began = time.process_time()
    made = call()
    into.append((time.process_time() - began) * 1000)
    return made


@dataclass(frozen=True)
class Restored:
    """What the background made of a loss."""

    moved: int
    steps: int
    look_ms: tuple[float, ...]
    placement: Placement


def restored(left: Placement, loads: tuple[tuple[int, ...], ...]) -> Restored:
    """Let the background rebalance do all it wants after the loss, a default budget's worth at a time."""
    config = ClusterConfig(
        cluster="bench", model="", served_model_name="", moe_layers=LAYERS, experts=EXPERTS, redundancy=REDUNDANCY,
        expert_bytes=EXPERT_BYTES,
    )  # fmt: skip
    members = tuple(Member(rank=rank, node=NODES[rank], incarnation=rank + 1) for rank in sorted(left))
    view, looks, moved, steps = View(epoch=1, members=members, placement=left), list[float](), 0, 0
    while True:
        state = ClusterState(revision=1, config=config, view=view, expert_load=ExpertLoad(at=0.0, loads=loads))
        facts = ClusterFacts(state, 0.0)
        better = timed(looks, lambda facts=facts: rebalance(facts))  # type: ignore[misc]
        if better is None:
            return Restored(moved, steps, tuple(looks), view.placement)
        moved += len(moves(view.placement, better.placement))
        steps += 1
        view = replace(view, placement=better.placement, unfinished=better.unfinished)


def balancedness(placement: Placement, loads: Loads) -> float:
    """The mean rank's load over the busiest one's: 1 is perfect."""
    return 1 / imbalance(placement, loads)


def row_planner(report: Report, cycles: int, seed: int) -> None:
    """Plans from nothing, to grow and after a loss; then what the background moves, and how even that is."""
    chance = random.Random(seed)
    fresh, unloaded, grown, mended, looks = (list[float]() for _ in range(5))
    shares, before, after = list[float](), list[float](), list[float]()
    for number in range(cycles):
        loads, lost = some_loads(seed + number), chance.randrange(RANKS)
        timed(unloaded, lambda: plan(LAYERS, EXPERTS, NODES, REDUNDANCY, nodes=NODES))
        placement = timed(fresh, lambda: plan(LAYERS, EXPERTS, NODES, REDUNDANCY, None, loads, NODES))  # noqa: B023
        left = {rank: held for rank, held in placement.items() if rank != lost}
        timed(grown, lambda: plan(LAYERS, EXPERTS, NODES, REDUNDANCY, left, loads, NODES))  # noqa: B023
        covered = timed(mended, lambda: repair(LAYERS, EXPERTS, left))  # noqa: B023
        orphans, done = len(moves(left, covered)), restored(covered, loads)
        if coverage(done.placement, done.placement, EXPERTS).min_live_replicas < 1:
            raise ElasticError("an expert has no holder")
        slots = sum(len(layer) for held in done.placement.values() for layer in held)
        shares.append(100 * done.moved / slots)
        before.append(balancedness(covered, loads))
        after.append(balancedness(done.placement, loads))
        looks += done.look_ms
        report.receipt(
            "planner", loads=seed + number, lost=lost, slots=slots, orphans=orphans, moved=done.moved,
            steps=done.steps, before=before[-1], after=after[-1],
        )  # fmt: skip
        say(f"planner {number}: {shares[-1]:.1f} % of slots moved in {done.steps} steps, balanced {after[-1]:.3f}")
    size = f"{LAYERS} x {EXPERTS} x {RANKS}, {HOSTS} hosts"
    report.add("plan from nothing, no loads known", size, "50 ms", unloaded)
    report.add("plan from nothing, loads known", size, "50 ms", fresh)
    report.add(f"plan {RANKS - 1} -> {RANKS} ranks", size, "50 ms", grown)
    report.add("repair after one loss (critical path)", size, "50 ms", mended)
    report.add("one look of the background after it", size, "", looks)
    report.add("background moves after one loss", "share of all slots", "<= 10 %", shares, 1, "%")
    report.add("- balancedness before them", "mean / busiest rank", "", before, 3, "")
    report.add("- balancedness after them", "mean / busiest rank", ">= 0.95", after, 3, "")
    report.note(f"planner: balancedness after one loss at least {min(after):.3f}, mean {statistics.fmean(after):.3f}")
