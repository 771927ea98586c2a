"""The search for a better balance, a few layers at a time: it ends where a search of all layers at once ends."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from membership.placement.balance import search
from membership.placement.plan import plan

pytestmark = pytest.mark.unit

LAYERS, EXPERTS, RANKS, REDUNDANCY = 9, 16, 6, 1.5
SLOTS = int(EXPERTS * REDUNDANCY)
NODES = {rank: f"host {rank % 2}" for rank in range(RANKS)}


def loads(seed: int) -> list[list[float]]:
    found: list[list[float]] = np.random.default_rng(seed).lognormal(0.0, 0.8, (LAYERS, EXPERTS)).tolist()
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_few_layers_at_a_time_end_where_all_at_once_do(seed: int, layers: int) -> None:
    now, measured = plan(LAYERS, EXPERTS, range(RANKS), REDUNDANCY, nodes=NODES), loads(seed)
    whole = search(now, measured, NODES, REDUNDANCY)
    assert whole.steps
    assert not whole.others()
    goal, searches = whole.after(sys.maxsize), 0
    while (found := search(now, measured, NODES, REDUNDANCY, slots=layers * SLOTS)).steps:
        assert len(found.layers) <= layers
        assert found.reached < found.before
        now, searches = found.after(sys.maxsize), searches + 1
        assert found.others() == (now != goal)
    assert now == goal
    assert searches > 1


def test_the_worst_layers_that_can_be_improved_come_first() -> None:
    now, measured = plan(LAYERS, EXPERTS, range(RANKS), REDUNDANCY, nodes=NODES), loads(1)
    whole = search(now, measured, NODES, REDUNDANCY)
    moved = {int(layer) for step in whole.steps for layer in step.layer}
    first = search(now, measured, NODES, REDUNDANCY, slots=2 * SLOTS)
    assert first.layers.tolist() == [layer for layer in whole.layers.tolist() if layer in moved][:2]
    few = first.moves // 2
    assert first.after(few) == whole.after(few)
