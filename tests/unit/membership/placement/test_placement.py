"""Placement keeps its promises for any cluster: coverage, balance, few moves, determinism; and says no in words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membership.base.errors import PlanRefused
from membership.placement.plan import Coverage, Move, coverage, max_ranks_allowed, moves, plan, thin_spread
from membership.store.records import Placement

pytestmark = pytest.mark.unit

sizes = st.tuples(
    st.integers(1, 3), st.integers(1, 24), st.sampled_from([1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0]), st.data()
)


def check(placement: Placement, layers: int, experts: int, redundancy: float) -> None:
    """Every invariant that holds for any placement."""
    ranks = sorted(placement)
    slots = min(max_ranks_allowed(experts, redundancy), experts * len(ranks))
    replicas = min(int(redundancy), len(ranks))
    for layer in range(layers):
        rows = [placement[rank][layer] for rank in ranks]
        assert all(list(row) == sorted(set(row)) for row in rows), "ascending, no expert twice on a rank"
        assert sum(map(len, rows)) == slots
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
        assert min(map(len, rows)) >= 1
        held = [sum(expert in row for row in rows) for expert in range(experts)]
        assert min(held) >= replicas
        assert sum(held) == slots, "no unknown expert"
    totals = [sum(map(len, placement[rank])) for rank in ranks]
    assert max(totals) - min(totals) <= 1, "over all layers too"
    assert coverage(placement, ranks, experts).min_live_replicas >= replicas


@settings(max_examples=150, deadline=None)
@given(sizes)
def test_any_episode_keeps_the_invariants(size: tuple[int, int, float, st.DataObject]) -> None:
    layers, experts, redundancy, data = size
    slot = st.sets(st.integers(0, 40), min_size=1, max_size=min(9, max_ranks_allowed(experts, redundancy)))
    loads = st.none() | st.lists(
        st.lists(st.floats(0, 1e6), min_size=experts, max_size=experts), min_size=layers, max_size=layers
    )
    placement: Placement = {}
    for _ in range(data.draw(st.integers(1, 4))):
        ranks, load = data.draw(slot), data.draw(loads)
        kept = {rank: held for rank, held in placement.items() if rank in ranks}
        placement = plan(layers, experts, ranks, redundancy, kept, load)
        assert sorted(placement) == sorted(ranks)
        check(placement, layers, experts, redundancy)
        assert plan(layers, experts, sorted(ranks), redundancy, kept, load) == placement


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_nothing_moves_where_nothing_changes(size: tuple[int, int, float, st.DataObject]) -> None:
    layers, experts, redundancy, data = size
    ranks = range(data.draw(st.integers(1, min(12, max_ranks_allowed(experts, redundancy)))))
    placement = plan(layers, experts, ranks, redundancy)
    assert plan(layers, experts, ranks, redundancy, placement) == placement


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_a_loss_moves_orphans_and_little_else(size: tuple[int, int, float, st.DataObject]) -> None:
    layers, experts, redundancy, data = size
    count = data.draw(st.integers(2, max(2, min(12, max_ranks_allowed(experts, redundancy)))))
    if count > max_ranks_allowed(experts, redundancy):
        return
    placement = plan(layers, experts, range(count), redundancy)
    lost = data.draw(st.integers(0, count - 1))
    kept = {rank: held for rank, held in placement.items() if rank != lost}
    after = plan(layers, experts, kept, redundancy, kept)
    orphans = sum(len(row) for row in placement[lost])
    assert len(moves(kept, after)) <= 2 * orphans  # each orphan at most hands one other expert on


def test_a_newcomer_takes_its_share_and_nothing_else_moves() -> None:
    before = plan(4, 64, range(7), 2.0)
    after = plan(4, 64, range(8), 2.0, before)
    check(after, 4, 64, 2.0)
    assert len(moves(before, after)) == 4 * 16
    assert {move.rank for move in moves(before, after)} == {7}


def test_a_real_model_after_a_loss() -> None:
    placement = plan(58, 256, range(64), 2.0)
    check(placement, 58, 256, 2.0)
    kept = {rank: held for rank, held in placement.items() if rank != 7}
    after = plan(58, 256, kept, 2.0, kept)
    check(after, 58, 256, 2.0)
    orphans = 58 * 8
    assert orphans <= len(moves(kept, after)) <= 1.02 * orphans, "and hardly anything else"


def test_any_one_loss_leaves_coverage() -> None:
    placement = plan(3, 16, range(5), 2.0)
    for lost in placement:
        assert coverage(placement, placement.keys() - {lost}, 16) == Coverage(1, ())
    assert coverage(placement, (), 16).min_live_replicas == 0
    assert len(coverage(placement, (), 16).uncovered) == 3 * 16


def test_replicas_of_a_rank_are_spread_over_many_others() -> None:
    placement = plan(1, 64, range(8), 2.0)
    for rank, (row,) in placement.items():
        partners = {other for other, (held,) in placement.items() if other != rank and set(held) & set(row)}
        assert len(partners) >= 6, f"rank {rank} shares its experts with {partners} only"


def test_spare_slots_go_to_the_most_loaded() -> None:
    placement = plan(1, 8, range(4), 1.25, loads=[[1, 1, 1, 90, 1, 1, 1, 1]])
    assert sum(3 in row for (row,) in placement.values()) == 3


def test_load_is_balanced_between_ranks() -> None:
    loads = [float(2**e) for e in range(8)]
    placement = plan(1, 8, range(2), 1.0, loads=[loads])
    sums = [sum(loads[e] for e in row) for (row,) in placement.values()]
    assert max(sums) / sum(loads) < 0.6


def test_an_expert_that_no_rank_holds_is_uncovered() -> None:
    assert coverage({0: ((0, 1),), 1: ((1,),)}, [0, 1], experts=3) == Coverage(0, ((0, 2),))
    assert coverage({0: ((0, 1),), 1: ((1,),)}, [1, 9]) == Coverage(0, ((0, 0),))


@pytest.mark.parametrize(
    ("experts", "redundancy", "ranks", "words"),
    [(8, 2.0, 0, "0 ranks"), (8, 2.0, 17, "17 ranks are more than the 16 slots"), (8, 0.5, 1, "redundancy 0.5"),
     (0, 2.0, 1, "0 experts"), (8, 1.25, 11, "than the 10 slots")],
)  # fmt: skip
def test_refusals_say_why(experts: int, redundancy: float, ranks: int, words: str) -> None:
    with pytest.raises(PlanRefused, match=words):
        plan(1, experts, range(ranks), redundancy)


def test_a_redundancy_beyond_all_numbers_is_a_replica_on_each_rank() -> None:
    assert plan(1, 2, range(2), 1e308) == {0: ((0, 1),), 1: ((0, 1),)}


def test_as_many_ranks_as_slots() -> None:
    check(plan(2, 8, range(16), 2.0), 2, 8, 2.0)
    assert moves({}, {3: ((1,), (0,))}) == [Move(3, 0, 1), Move(3, 1, 0)]


@pytest.mark.parametrize(("redundancy", "ranks", "told"), [(2, 2, False), (3, 2, True), (1.25, 1, True), (1, 1, False)])
def test_less_redundancy_than_asked_for_is_told(redundancy: float, ranks: int, told: bool) -> None:
    assert bool(thin_spread(redundancy, ranks)) is told
