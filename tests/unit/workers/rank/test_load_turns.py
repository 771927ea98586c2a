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


@pytest.mark.parametrize(("before", "after"), [(16, 15), (8, 9), (256, 255), (256, 8)])
def test_a_change_of_the_number_of_ranks_is_no_report_and_all_take_their_turns_from_then_on(
    before: int, after: int
) -> None:
    """The step after a death is the one that recovery waits for."""
    turns = [LoadTurns() for _ in range(min(before, after))]
    assert all(each.due(BEGAN, rank, before) for rank, each in enumerate(turns))
    assert not any(each.due(BEGAN + STEP_S, rank, after) for rank, each in enumerate(turns))
    steps = round(LOAD_REPORT_S * max(1.0, after / AT_ONCE) / STEP_S) + 1
    reported = [
        step for step in range(2, steps + 2) for rank, each in enumerate(turns)
        if each.due(BEGAN + step * STEP_S, rank, after)
    ]  # fmt: skip
    assert len(turns) <= len(reported) <= len(turns) + 2, "each within a turn"
    assert max(Counter(reported).values()) <= 2, "not all in the same step"
