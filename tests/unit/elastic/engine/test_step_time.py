"""What a step is expected to take: ranks share its work, so the fewer they are, the longer it is."""

from __future__ import annotations

import pytest

from elastic.engine.step_time import StepTime

pytestmark = pytest.mark.unit


def test_nothing_is_expected_of_the_first_step() -> None:
    assert StepTime().expected_s(4) == 0.0


@pytest.mark.parametrize(("ranks", "expected_s"), [(1, 8.0), (3, 8 / 3), (4, 2.0), (8, 1.0), (0, 8.0)])
def test_ranks_share_a_step(ranks: int, expected_s: float) -> None:
    time = StepTime()
    time.begin(10.0, 4)
    time.answered(11.0)
    time.answered(12.0)
    assert time.expected_s(ranks) == pytest.approx(expected_s)


@pytest.mark.parametrize("died_s", [0.0, 0.5, 1.0, 1.98, 2.0])
def test_it_is_the_same_whenever_in_the_last_step_a_rank_died(died_s: float) -> None:
    """Two ranks would have taken two seconds for it; what is left at the death takes one rank twice as long."""
    time = StepTime()
    time.begin(5.0, 2)
    time.left(5.0 + died_s, 1)
    time.answered(5.0 + died_s + 2 * (2.0 - died_s))
    assert time.expected_s(1) == pytest.approx(4.0)
    time.begin(100.0, 1)
    assert time.expected_s(1) == pytest.approx(4.0), "the last answered one's, while the next is under way"
    time.answered(104.5)
    assert time.expected_s(2) == pytest.approx(2.25)


def test_a_death_between_two_steps_is_in_neither() -> None:
    time = StepTime()
    time.begin(0.0, 2)
    time.answered(1.0)
    time.left(50.0, 1)
    assert time.expected_s(1) == pytest.approx(2.0)
    time.begin(60.0, 1)
    time.answered(62.0)
    assert time.expected_s(1) == pytest.approx(2.0)
