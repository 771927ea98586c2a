"""The restart policy: at once, then ever later, then never."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membership.base.rank_id import RankId
from membership.store.records import RankExit
from workers.agent.restart_policy import RestartPolicy, backoff_s, counted, exit_record, recent_deaths

NOW = 1000.0

pytestmark = pytest.mark.unit

POLICY = RestartPolicy(base_s=0.1, factor=2, max_s=2.0, jitter=0.5, intensity=4, window_s=60)


def die(deaths: tuple[float, ...], now: float, restarts: int = 0, chance: float = 0.0) -> RankExit:
    return exit_record(POLICY, RankId(3, 7), "gone", deaths, restarts, now, chance)


def test_the_first_death_costs_no_delay() -> None:
    verdict = die((), 1000.0)
    assert (verdict.rank, verdict.incarnation, verdict.restarts, verdict.quarantined) == (3, 7, 1, False)
    assert verdict.not_before == 1000.0


def test_deaths_that_follow_one_another_back_off() -> None:
    delays = [backoff_s(POLICY, n, 0.0) for n in (1, 2, 3, 4, 10)]
    assert delays == pytest.approx([0.0, 0.1, 0.2, 0.4, 2.0])


def test_enough_deaths_in_the_window_mean_quarantine_with_a_reason() -> None:
    assert not die((990.0, 995.0), 1000.0).quarantined
    verdict = die((980.0, 990.0, 995.0), 1000.0)
    assert verdict.quarantined
    assert "4 deaths within 60 s" in verdict.reason


def test_deaths_that_an_operator_forgave_count_no_more() -> None:
    last = RankExit(rank=3, incarnation=7, reason="gone", at=995.0, forgiven=995.5)
    assert counted((980.0, 995.0, 996.0), last) == (996.0,)
    assert counted((980.0,), None) == (980.0,)


def test_old_deaths_are_forgiven_but_counted() -> None:
    verdict = die((100.0, 200.0, 300.0), 1000.0, restarts=3)
    assert not verdict.quarantined
    assert verdict.restarts == 4
    assert verdict.not_before == 1000.0
    assert recent_deaths(POLICY, (100.0, 950.0), 1000.0) == (950.0,)


def test_a_death_dated_by_a_clock_far_ahead_does_not_count_until_that_time() -> None:
    assert recent_deaths(POLICY, (1060.0, 1001.0, 999.0), 1000.0) == (1001.0, 999.0)


@given(st.integers(2, 10**6), st.floats(0, 0.999))
def test_a_backoff_is_finite_and_bounded(recent: int, chance: float) -> None:
    assert POLICY.base_s <= backoff_s(POLICY, recent, chance) <= POLICY.max_s * (1 + POLICY.jitter)


@pytest.mark.parametrize("ahead_s", [0.0, 1.0, 60.0, 3600.0])
def test_an_agent_whose_clock_is_ahead_does_not_keep_its_slots_empty(ahead_s: float) -> None:
    """Found by `elastic-chaos replay --seed 351`: the only rank died, and was not replaced for as long as that."""
    first, second = (
        exit_record(RestartPolicy(), RankId(0, 1), "", deaths, 0, NOW + ahead_s, 0.0)
        for deaths in ((), (NOW + ahead_s - 1,))
    )
    assert not first.held_back_s(NOW), "a first death costs no delay"
    assert second.held_back_s(NOW) == pytest.approx(ahead_s + 0.1 if ahead_s <= 1.0 else 0.0)
    assert not second.held_back_s(second.not_before)
