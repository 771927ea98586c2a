"""Which rank is asked for a (row, expert) pair: each pair once, live holders only; again only what is missing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from membership.base.errors import CoverageLost
from membership.store.records import Member, Placement, View
from workers.exchange.model_side import StepContext
from workers.exchange.router import FEW, Parcel, Router, split

pytestmark = pytest.mark.unit


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, Placement, np.ndarray, int]:
    """(me, placement of one layer, ids [T, K], excluded bits); a rank numbers need not be consecutive."""
    ranks = draw(st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True))
    experts = draw(st.integers(1, 9))
    holders = [draw(st.sets(st.sampled_from(ranks), min_size=1)) for _ in range(experts)]
    placement = {r: (tuple(e for e in range(experts) if r in holders[e]),) for r in ranks}
    top_k = draw(st.integers(1, min(3, experts)))
    ids = draw(st.lists(st.permutations(range(experts)).map(lambda p: p[:top_k]), max_size=8))
    excluded = sum(1 << r for r in draw(st.sets(st.sampled_from(ranks))))
    return draw(st.sampled_from(ranks)), placement, np.array(ids, dtype=np.int64).reshape(-1, top_k), excluded


def holders_of(placement: Placement, expert: int, excluded: int = 0) -> set[int]:
    return {r for r, layers in placement.items() if expert in layers[0] and not excluded >> r & 1}


def asked(parcels: list[Parcel]) -> Counter[int]:
    return Counter(p for parcel in parcels for p in parcel.pairs.tolist())


def check_shape(parcel: Parcel, ids: np.ndarray) -> None:
    """Each row once; every pair names its own row and expert; experts ascend."""
    assert len(set(parcel.rows.tolist())) == len(parcel.rows)
    assert (parcel.rows[parcel.row_of] == parcel.pairs // ids.shape[1]).all()
    assert parcel.experts == sorted(set(parcel.experts))
    assert (ids.reshape(-1)[parcel.pairs] == np.repeat(parcel.experts, parcel.counts)).all()


@given(scenes())
def test_few_and_many_pairs_are_routed_alike(scene: tuple[int, Placement, np.ndarray, int]) -> None:
    me, placement, ids, _ = scene
    few, many = Router(me, placement), Router(me, placement)
    one = few.parcels(0, ids.reshape(-1), ids.shape[1], 0)
    repeated = np.concatenate([ids] * FEW)  # the same rows often enough to be many
    all_of_it = many.parcels(0, repeated.reshape(-1), ids.shape[1], 0)
    assert [p.rank for p in all_of_it] == sorted(p.rank for p in one)
    for small in one:
        large = next(p for p in all_of_it if p.rank == small.rank)
        assert large.experts == small.experts
        assert large.counts == [FEW * c for c in small.counts]
        assert {p % ids.size for p in large.pairs.tolist()} == set(small.pairs.tolist())
        check_shape(large, repeated)


@given(scenes())
def test_every_pair_goes_once_to_a_live_holder_or_coverage_is_lost(
    scene: tuple[int, Placement, np.ndarray, int],
) -> None:
    me, placement, ids, excluded = scene
    flat, top_k = ids.reshape(-1), ids.shape[1]
    router = Router(me, placement)
    if any(not holders_of(placement, e, excluded) for e in flat.tolist()):
        with pytest.raises(CoverageLost):
            router.parcels(0, flat, top_k, excluded)
        return
    parcels = router.parcels(0, flat, top_k, excluded)
    assert asked(parcels) == Counter(range(len(flat)))
    assert len({p.rank for p in parcels}) == len(parcels)
    for parcel in parcels:
        check_shape(parcel, ids)
        for expert in parcel.experts:
            live = holders_of(placement, expert, excluded)
            assert parcel.rank in live
            assert me not in live or parcel.rank == me


@given(scenes(), st.data())
def test_a_loss_moves_only_what_the_lost_rank_had_not_answered(
    scene: tuple[int, Placement, np.ndarray, int], data: st.DataObject
) -> None:
    me, placement, ids, _ = scene
    flat, top_k = ids.reshape(-1), ids.shape[1]
    router = Router(me, placement)
    parcels = router.parcels(0, flat, top_k, 0)
    if not parcels:
        return
    lost = data.draw(st.sampled_from(parcels))
    orphans = [e for e in lost.experts if not holders_of(placement, e, 1 << lost.rank)]
    if orphans:
        with pytest.raises(CoverageLost, match=str(orphans[0])):
            router.parcels(0, flat, top_k, 1 << lost.rank, pairs=lost.pairs)
        return
    again = router.parcels(0, flat, top_k, 1 << lost.rank, pairs=lost.pairs)
    assert asked(again) == asked([lost])
    assert all(p.rank != lost.rank for p in again)
    for parcel in again:
        check_shape(parcel, ids)
    # and a rank that is asked from the start without the lost rank is asked for what the others had anyhow
    fresh = {p: parcel.rank for parcel in router.parcels(0, flat, top_k, 1 << lost.rank) for p in parcel.pairs.tolist()}
    for parcel in parcels:
        if parcel is not lost:
            assert all(fresh[p] == parcel.rank for p in parcel.pairs.tolist())


@given(scenes())
def test_a_refused_expert_goes_to_the_next_holder(scene: tuple[int, Placement, np.ndarray, int]) -> None:
    me, placement, ids, _ = scene
    flat, top_k = ids.reshape(-1), ids.shape[1]
    router = Router(me, placement)
    for parcel in router.parcels(0, flat, top_k, 0)[:1]:
        expert = parcel.experts[0]
        refused = frozenset({(parcel.rank, expert)})
        pairs = parcel.pairs[: parcel.counts[0]]
        if holders_of(placement, expert) == {parcel.rank}:
            with pytest.raises(CoverageLost):
                router.parcels(0, flat, top_k, 0, refused, pairs)
        else:
            again = router.parcels(0, flat, top_k, 0, refused, pairs)
            assert asked(again) == Counter(pairs.tolist())
            assert all(p.rank != parcel.rank for p in again)


@given(scenes(), st.integers(1, 5))
def test_a_large_parcel_splits_without_loss(scene: tuple[int, Placement, np.ndarray, int], most: int) -> None:
    me, placement, ids, _ = scene
    for parcel in Router(me, placement).parcels(0, ids.reshape(-1), ids.shape[1], 0):
        parts = split(parcel, most, ids.shape[1])
        assert asked(parts) == asked([parcel])
        assert all(0 < len(part.pairs) <= most for part in parts)
        for part in parts:
            check_shape(part, ids)


@settings(suppress_health_check=[HealthCheck.too_slow])  # slow only on a machine with other work
@given(scenes())
def test_a_row_goes_where_it_would_go_alone_whenever_it_is_asked_again(
    scene: tuple[int, Placement, np.ndarray, int],
) -> None:
    """The replica depends on (layer, home rank, expert, live ranks): not on batch mates, nor on what came before."""
    me, placement, ids, excluded = scene
    router = Router(me, placement)
    flat, top_k = np.tile(ids, (FEW, 1)).reshape(-1), ids.shape[1]
    if any(not holders_of(placement, e, excluded) for e in flat.tolist()):
        return
    together = {p: parcel.rank for parcel in router.parcels(0, flat, top_k, excluded) for p in parcel.pairs.tolist()}
    for number, row in enumerate(ids):
        alone = Router(me, dict(reversed(placement.items()))).parcels(0, row, top_k, excluded)
        chosen = {p: parcel.rank for parcel in alone for p in parcel.pairs.tolist()}
        for copy in range(FEW):
            first = (copy * len(ids) + number) * top_k
            assert {p - first: together[p] for p in range(first, first + top_k)} == chosen


@pytest.mark.parametrize("live", [1, 2])
def test_rows_go_to_live_replicas_only(live: int) -> None:
    holders = (1, 2)
    router = Router(0, {0: ((),)} | {rank: (tuple(range(8)),) for rank in holders})
    excluded = sum(1 << rank for rank in holders if rank != live)
    parcels = router.parcels(0, np.arange(8), 1, excluded)
    assert {parcel.rank for parcel in parcels} == {live}


def test_replicas_share_the_load() -> None:
    everywhere: Placement = {r: (tuple(range(240)) if r else (),) for r in range(5)}
    owners = Counter(Router(0, everywhere).owners(0, 0).tolist())
    assert set(owners) == {1, 2, 3, 4}
    assert min(owners.values()) > 40, owners


def test_replicas_share_the_load_of_each_layer_and_source_anew() -> None:
    """Else the pairs of one expert would go to one rank from everywhere and in every layer."""
    everywhere: Placement = {r: (tuple(range(240)),) * 2 if 0 < r < 5 else ((), ()) for r in range(6)}
    one, other = Router(0, everywhere), Router(5, everywhere)
    alike = [(one.owners(0, 0) == each).mean() for each in (one.owners(1, 0), other.owners(0, 0), other.owners(1, 0))]
    assert max(alike) < 0.4, "a quarter, by chance"


def test_rows_stay_on_their_host_where_a_replica_is_there() -> None:
    """And its ranks share them; they leave it only when these are lost."""
    everywhere: Placement = {r: (tuple(range(240)) if r else (),) for r in range(5)}
    router = Router(0, everywhere, near={0, 1, 2})
    owners = Counter(router.owners(0, 0).tolist())
    assert set(owners) == {1, 2}
    assert min(owners.values()) > 80, owners
    assert set(router.owners(0, 0b10).tolist()) == {2}
    assert set(router.owners(0, 0b110).tolist()) == {3, 4}


def test_near_are_the_ranks_of_the_own_host() -> None:
    members = tuple(Member(rank=rank, node="ab"[rank // 2], incarnation=1) for rank in range(4))
    ctx = StepContext(View(epoch=1, members=members), 1, 1, 1)
    assert ctx.near(1) == {0, 1}
    assert ctx.near(2) == {2, 3}
    assert ctx.near(9) == frozenset(), "it is no member"


def test_a_rank_knows_whether_it_holds_all_of_them() -> None:
    router = Router(1, {0: ((0, 1), (2,)), 1: ((0, 2), (1,))})
    assert router.all_mine(0, [0, 2])
    assert router.all_mine(1, [1])
    assert not router.all_mine(0, [0, 1])
    assert not router.all_mine(2, [])
    assert not router.all_mine(-1, [])
    assert not Router(5, {0: ((0,),)}).all_mine(0, [0]), "it is not in the placement"


def test_no_rows_travel_where_each_rank_holds_all_experts_of_all_layers() -> None:
    whole, part = (0, 1, 2), (0, 2)
    assert Router(0, {0: (whole, whole)}).everywhere
    assert Router(0, {0: (whole, whole), 3: (whole, whole)}).everywhere
    assert not Router(0, {0: (whole, whole), 3: (whole, part)}).everywhere, "rank 3 may ask"
    assert not Router(0, {0: (part, whole), 3: (whole, whole)}).everywhere
    assert not Router(0, {}).everywhere


@pytest.mark.parametrize("pairs", [1, FEW + 1])
def test_unknown_layers_and_experts_have_no_owner(pairs: int) -> None:
    router = Router(0, {0: ((0, 1),)})
    with pytest.raises(CoverageLost, match="layer 3"):
        router.parcels(3, np.zeros(pairs, dtype=np.int64), 1, 0)
    for unknown in (-1, 2, 7):
        with pytest.raises(CoverageLost, match=f"\\[{unknown}\\]"):
            router.parcels(0, np.full(pairs, unknown), 1, 0)
