"""Background rebalance: what it moves, how much at a time, when it starts and when it leaves off."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from membership.base.timing import BALANCE_REST_S, FAILED_REST_S
from membership.placement.balance import balanced, cut, imbalance
from membership.placement.plan import coverage, moves, plan, repair
from membership.placement.survivability import survivability
from membership.planning.cluster_facts import ClusterFacts
from membership.planning.planner import reconcile
from membership.planning.rebalance import rebalance
from membership.store.records import ClusterState, ExpertLoad, Member, Placement, RebalanceRequest, View
from tests.support.world import CONFIG, World

pytestmark = pytest.mark.unit

MEMORY = 1000


def up(count: int = 4, *, budget: int = 1 << 30, redundancy: float = 2.0, nodes: tuple[str, ...] = ("a",)) -> World:
    config = replace(CONFIG, expert_bytes=MEMORY, rebalance_bytes=budget, redundancy=redundancy)
    world = World(desired=count, config=config, nodes=nodes)
    world.settle()
    return world


def skew(world: World) -> tuple[tuple[int, ...], ...]:
    """From now on what rank 0 holds is asked for 20 times as often as the rest."""
    view = world.state.view
    assert view is not None
    loads = tuple(tuple(160 if e in held else 8 for e in range(8)) for held in view.placement[0])
    world.put(world.keys.expert_load, ExpertLoad(at=world.now, loads=loads))
    return loads


def loaded(world: World, since: int = 0) -> list[int]:
    """How many experts each change had ranks load."""
    views = [effect.stage for effect in world.effects[since:] if effect.stage is not None]
    before = [effect.commit for effect in world.effects if effect.commit is not None]
    by_epoch = {view.epoch: view for view in before}
    return [len(moves(by_epoch[v.epoch - 1].placement, v.placement)) for v in views if v.epoch - 1 in by_epoch]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_balance_gets_better_and_nothing_else_worse(data: st.DataObject) -> None:
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(4, 16))
    redundancy = data.draw(st.sampled_from([1.0, 1.25, 2.0]))
    ranks = range(data.draw(st.integers(2, 4)))
    nodes = {rank: data.draw(st.sampled_from("ab")) for rank in ranks}
    one = st.lists(st.integers(0, 500), min_size=experts, max_size=experts)
    loads = data.draw(st.lists(one, min_size=layers, max_size=layers))
    most = data.draw(st.integers(0, 12))
    before = plan(layers, experts, ranks, redundancy, nodes=nodes)
    after = balanced(before, loads, nodes, redundancy, most)
    assert imbalance(after, loads) <= imbalance(before, loads)
    assert len(moves(before, after)) <= most
    assert [list(map(len, held)) for held in before.values()] == [list(map(len, held)) for held in after.values()]
    assert coverage(after, ranks, experts).min_live_replicas >= int(redundancy)
    was, now = (survivability(p, nodes, layers, experts) for p in (before, after))
    assert set(now.vital_ranks) <= set(was.vital_ranks) or redundancy < 2
    assert set(now.vital_hosts) <= set(was.vital_hosts) or redundancy < 2


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_cut_never_lowers_coverage_and_leads_there_in_the_end(data: st.DataObject) -> None:
    experts, budget = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 5))
    start = plan(2, experts, range(3), 2.0)
    now = {rank: start[rank] for rank in (0, 1)}
    now[2] = ((), ())
    if coverage(now, now, experts).min_live_replicas < 1:
        return
    goal = plan(2, experts, range(3), 2.0)
    for _ in range(100):
        step = cut(now, goal, 2, experts, budget)
        assert len(moves(now, step)) <= budget
        assert coverage(step, step, experts).min_live_replicas >= coverage(now, now, experts).min_live_replicas
        now = step
        if now == goal:
            return
    pytest.fail("it never gets there")


def test_a_lasting_loss_is_made_durable_with_no_load_and_restored_in_the_background() -> None:
    world = up(budget=2 * MEMORY)
    seen = len(world.effects)
    world.kill(1, quarantined=True)
    world.settle()
    assert world.serving == (0, 2, 3)
    first, *steps = loaded(world, seen)
    assert first == 0, "the critical path loads nothing"
    assert sum(steps) >= 8, "what rank 1 held is elsewhere now"
    assert max(steps) <= 2, "within the budget of each change"
    view = world.state.view
    assert view is not None
    assert coverage(view.placement, view.ranks, 8).min_live_replicas == 2
    assert not world.evicted - {(1, 2)}


def test_lost_experts_are_all_that_is_loaded_at_first() -> None:
    world = up(redundancy=1.0)
    view = world.state.view
    assert view is not None
    orphans = sum(map(len, view.placement[2]))
    seen = len(world.effects)
    world.kill(2, quarantined=True)
    world.settle()
    assert loaded(world, seen)[0] == orphans


@pytest.mark.parametrize("redundancy", [1.0, 2.0])
def test_only_what_requests_wait_for_is_urgent(redundancy: float) -> None:
    world = up(redundancy=redundancy)
    assert [view.urgent for view in staged(world)] == [True], "the first view: no rank holds anything yet"
    seen = len(world.effects)
    world.kill(2, quarantined=True)
    world.settle()
    skew(world)
    world.now += 60.0
    world.settle()
    loss, *rest = staged(world, seen)
    assert loss.urgent == (redundancy == 1.0)
    assert rest
    assert not any(view.urgent for view in rest)


def staged(world: World, since: int = 0) -> list[View]:
    return [effect.stage for effect in world.effects[since:] if effect.stage is not None]


def test_load_is_balanced_once_and_then_left_alone() -> None:
    world = up(budget=2 * MEMORY)
    view = world.state.view
    assert view is not None
    skewed = skew(world)
    before, epochs = imbalance(view.placement, skewed), len(world.epochs)
    assert before > 1.3
    world.settle()
    after = world.state.view
    assert after is not None
    assert imbalance(after.placement, skewed) < 0.9 * before
    assert len(world.epochs) > epochs
    assert max(loaded(world)) <= 2
    assert after.members == view.members
    done = list(world.epochs)
    for _ in range(10):  # other numbers that say the same
        world.now += 60.0
        noisy = tuple(tuple(n + (n * k // 40) for n in layer) for k, layer in enumerate(skewed))
        world.put(world.keys.expert_load, ExpertLoad(at=world.now, loads=noisy))
        world.settle()
    assert world.epochs == done, "it does not flap"


def test_what_was_begun_is_finished_and_a_loss_ends_in_balance() -> None:
    """As many experts as it takes until every rank has its share again: few of all, and within the budget each time."""
    layers, experts, ranks = 6, 64, 16
    config = replace(
        CONFIG, moe_layers=layers, experts=experts, expert_bytes=MEMORY, rebalance_bytes=9 * MEMORY, redundancy=1.25
    )
    loads = tuple(tuple(4 + (e * e * 7 + layer) % 41 for e in range(experts)) for layer in range(layers))
    nodes = {rank: "a" for rank in range(ranks)}
    whole = plan(layers, experts, nodes, 1.25, loads=loads)
    view = View(
        epoch=1, members=tuple(Member(rank=r, node="a", incarnation=r + 1) for r in range(1, ranks)),
        placement=repair(layers, experts, {r: held for r, held in whole.items() if r}),
    )  # fmt: skip
    moved, steps = 0, 0
    while True:
        state = ClusterState(revision=1, config=config, view=view, expert_load=ExpertLoad(at=1.0, loads=loads))
        better = rebalance(ClusterFacts(state, 0.0))
        if better is None:
            break
        assert len(moves(view.placement, better.placement)) <= 9
        moved += len(moves(view.placement, better.placement))
        steps += 1
        view = replace(view, placement=better.placement, unfinished=better.unfinished)
    assert steps > 3
    assert 1 / imbalance(view.placement, loads) >= 0.95
    assert moved <= 0.2 * layers * experts * 1.25, "a third of it to have what the dead rank had"


def skewed_facts(budget: int, expert_bytes: int = MEMORY, **changes: object) -> ClusterFacts:
    """Three ranks with uneven loads, of which no exchange of one expert makes anything better."""
    config = replace(CONFIG, moe_layers=1, experts=4, redundancy=1.5, expert_bytes=expert_bytes, rebalance_bytes=budget)
    members = tuple(Member(rank=rank, node="a", incarnation=rank + 1) for rank in range(3))
    nodes = {rank: "a" for rank in range(3)}
    view = View(epoch=1, members=members, placement=plan(1, 4, nodes, 1.5, nodes=nodes), staged=100.0)
    loads = ExpertLoad(at=1.0, loads=((100, 1, 1, 40),))
    return ClusterFacts(ClusterState(revision=1, config=config, view=view, expert_load=loads, **changes), 110.0)  # type: ignore[arg-type]


def test_a_budget_of_one_expert_moves_one() -> None:
    facts = skewed_facts(budget=MEMORY)
    better = rebalance(facts)
    assert better is not None
    assert len(moves(facts.view.placement, better.placement)) == 1
    loads = ((100, 1, 1, 40),)
    assert imbalance(better.placement, loads) < imbalance(facts.view.placement, loads)


def test_both_replicas_of_an_expert_on_one_host_are_parted() -> None:
    config = replace(CONFIG, moe_layers=1, experts=4, redundancy=2.0, expert_bytes=MEMORY, rebalance_bytes=1 << 30)
    members = tuple(Member(rank=rank, node="aabb"[rank], incarnation=rank + 1) for rank in range(4))
    placement = {rank: ((0, 1) if rank < 2 else (2, 3),) for rank in range(4)}
    view = View(epoch=1, members=members, placement=placement)
    better = rebalance(ClusterFacts(ClusterState(revision=1, config=config, view=view), 0.0))
    assert better is not None
    nodes = {member.rank: member.node for member in members}
    assert survivability(placement, nodes, 1, 4).vital_hosts
    assert not survivability(better.placement, nodes, 1, 4).vital_hosts


@pytest.mark.parametrize(("later_s", "asked"), [(-1.0, False), (0.0, False), (1.0, True)])
def test_a_request_is_about_the_view_that_it_found(later_s: float, asked: bool) -> None:
    """A view that was staged since may be its answer."""
    better = rebalance(skewed_facts(budget=1 << 30, rebalance=RebalanceRequest(at=100.0 + later_s)))
    assert better is not None
    assert better.at == (0.0 if asked else 100.0 + BALANCE_REST_S)


def test_nothing_is_moved_where_it_is_off_or_loads_are_even() -> None:
    world = up(budget=0)
    skew(world)
    world.now += 100.0
    world.settle()
    assert world.epochs == [1]
    assert rebalance(skewed_facts(budget=0, expert_bytes=0)) is None, "whatever an expert weighs"
    unborn = replace(skewed_facts(budget=1 << 30).state, view=None)
    assert rebalance(ClusterFacts(unborn, 110.0)) is None
    world = up()
    world.put(world.keys.expert_load, ExpertLoad(at=world.now, loads=((16,) * 8, (16,) * 8)))
    world.now += 100.0
    world.settle()
    assert world.epochs == [1]
    world.put(world.keys.expert_load, ExpertLoad(at=world.now, loads=((16,) * 5,)))  # of another model
    world.settle()
    assert world.epochs == [1]


def test_a_death_and_an_operation_go_first() -> None:
    world = up()
    skew(world)
    world.now += 60.0
    assert world.controller_acts()
    staged = world.state.next
    assert staged is not None
    assert {m.rank for m in staged.members} == {0, 1, 2, 3}
    world.kill(1)
    world.controller_acts()
    world.controller_acts()
    assert world.state.next is not None
    assert world.state.next.ranks == (0, 2, 3)
    world.settle()
    world.assert_whole(4)
    name = world.scale(6).id
    world.settle()
    world.assert_whole(6)
    assert world.state.operations[name].phase.value == "done"


def test_a_staged_rebalance_yields_to_an_operation_of_the_same_size() -> None:
    """Else its commit would count as the operation's."""
    world = up()
    skew(world)
    world.now += 60.0
    assert world.controller_acts()
    world.agents_act()
    assert ClusterFacts(world.state, world.now).unprepared == ()
    name = world.scale(4).id
    (effect,) = reconcile(world.state, world.now)
    assert effect.unstage
    assert effect.commit is None
    world.settle(until=lambda: not world.state.operations[name].active)
    assert (world.epochs, world.state.operations[name].epoch) == ([1], 1)
    world.settle()
    assert world.epochs == [1, 2], "it is balanced afterwards"


def test_nothing_is_balanced_among_dead_ranks() -> None:
    world = up()
    skew(world)
    world.stop_agent("a")
    world.now += 60.0
    assert world.engine_acts()
    world.settle()
    assert ClusterFacts(world.state, world.now).alive == ()
    assert world.state.next is None
    assert reconcile(world.state, world.now) == []


def test_who_cannot_prepare_a_rebalance_serves_on() -> None:
    world = up()
    skew(world)
    world.bad = {0, 1, 2, 3}
    began = world.now
    while world.now < began + 3 * FAILED_REST_S:
        world.controller_acts()
        world.agents_act()
        world.now += 0.5
    assert world.evicted == set()
    assert world.epochs == [1]
    assert sum(effect.stage is not None for effect in world.effects[-20:]) <= 4
    world.bad = set()
    world.settle()
    world.assert_whole(4)


def test_another_host_is_used_as_soon_as_ranks_run_there() -> None:
    world = up(2)
    world.start_agent("b")
    world.scale(4)
    world.settle()
    view = world.state.view
    assert view is not None
    nodes = {m.rank: m.node for m in view.members}
    assert sorted(nodes.values()) == ["a", "a", "b", "b"]
    assert survivability(view.placement, nodes, 2, 8).vital_hosts == ()
    world.stop_agent("a")
    while world.epochs[-1] == view.epoch:
        assert world.controller_acts() | world.agents_act() | world.engine_acts()
    assert loaded(world)[-1] == 0, "a host died, and no rank had to load anything"


def test_other_loads_need_no_plan_of_redundancy_where_it_cannot_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a quarter of a second for a large model, and would not be used: only what was lost needs it."""
    planned = list[object]()

    def planning(*args: Any) -> Placement:
        planned.append(args)
        return plan(*args)

    monkeypatch.setattr("membership.planning.rebalance.plan", planning)
    world = up(redundancy=1.5, nodes=("a", "b"))
    skew(world)
    found = rebalance(ClusterFacts(world.state, world.now + 2 * BALANCE_REST_S))
    assert found is not None
    assert found.reason.startswith("load is balanced")
    assert not planned
    view = world.state.view
    assert view is not None
    poorer = {**view.placement, 0: tuple(held[1:] for held in view.placement[0])}
    lacking = replace(world.state, view=replace(view, placement=poorer))
    found = rebalance(ClusterFacts(lacking, world.now + 2 * BALANCE_REST_S))
    assert found is not None
    assert found.reason == "redundancy is restored"
    assert planned


def test_a_second_replica_on_the_same_host_is_not_as_good_as_can_be() -> None:
    world = up(4, redundancy=2.0, nodes=("a", "b"))
    view = world.state.view
    assert view is not None
    one, other = ((m.rank for m in view.members if m.node == node) for node in ("a", "b"))
    (a, b), (c, d) = sorted(one), sorted(other)
    low, high = tuple(range(4)), tuple(range(4, 8))
    layers = CONFIG.moe_layers
    placement = {a: (low,) * layers, b: (low,) * layers, c: (high,) * layers, d: (high,) * layers}
    apart = replace(world.state, view=replace(view, placement=placement))
    found = rebalance(ClusterFacts(apart, world.now + 2 * BALANCE_REST_S))
    assert found is not None
    assert found.reason == "redundancy is restored"
