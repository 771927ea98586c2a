"""The engine gets a steady number of reports of load, however many ranks there are."""

from __future__ import annotations

from collections import Counter

import pytest

from membership.base.timing import LOAD_REPORT_S
from workers.rank.load_turns import AT_ONCE, LoadTurns

pytestmark = pytest.mark.unit

STEP_S, BEGAN = 0.05, 1234.5


@pytest.mark.parametrize("ranks", [1, 4, 16, 256])
def test_reports_come_at_a_steady_rate_and_from_everybody(ranks: int) -> None:
    turns = [LoadTurns() for _ in range(ranks)]
    for rank, each in enumerate(turns):
        assert each.due(BEGAN, rank, ranks), "the first step's"
    reported, at_once = Counter[int](), Counter[int]()
    steps = round(64 * LOAD_REPORT_S / STEP_S)
    for step in range(1, steps + 1):
        for rank, each in enumerate(turns):
            if each.due(BEGAN + step * STEP_S, rank, ranks):
                reported[rank] += 1
                at_once[step] += 1
    wanted = 64 * min(1.0, AT_ONCE / ranks)
    assert all(wanted - 1 <= reported[rank] <= wanted + 1 for rank in range(ranks))
    assert max(at_once.values()) <= 2, "not all in the same step"


def test_a_rank_that_computed_nothing_for_long_reports_with_its_next_step() -> None:
    turns = LoadTurns()
    assert turns.due(10.0, 3, 256)
    assert not turns.due(10.01, 3, 256)
    assert turns.due(1000.0, 3, 256)


def test_another_number_of_ranks_is_another_turn() -> None:
    turns = LoadTurns()
    assert turns.due(10.0, 0, 256)
    assert turns.due(10.0, 0, 8)
    assert not turns.due(10.0, 0, 8)
