"""How long the store takes, and how long a lease must last then."""

from __future__ import annotations

import pytest

from membership.base.timing import LEASE_TTL_MAX_S, LEASE_TTL_S, STORE_CALL_TIMEOUT_S
from membership.store.pace import ANSWERS, Pace, fitting_ttl_s, renewal_timeout_s

pytestmark = pytest.mark.unit


def test_one_slow_call_says_nothing_and_three_of_five_do() -> None:
    pace = Pace()
    assert pace.seconds == 0.0
    for took_s in (0.01, 0.02, 9.0, 0.01, 0.02):
        pace.note(took_s)
    assert pace.seconds == 0.02
    for took_s in (1.0, 1.5, 2.0):
        pace.note(took_s)
    assert pace.seconds == 1.0
    for _ in range(3):
        pace.note(0.01)
    assert pace.seconds == 0.01


@pytest.mark.parametrize(
    ("pace_s", "ttl_s"), [(0.0, 3.0), (0.1, 3.0), (0.5, 3.0), (0.6, 6.0), (1.0, 6.0), (1.1, 12.0), (2.1, 20.0), (9, 20)]
)
def test_a_lease_lasts_for_six_answers_within_its_bounds(pace_s: float, ttl_s: float) -> None:
    assert fitting_ttl_s(LEASE_TTL_S, pace_s) == ttl_s
    assert ttl_s >= min(ANSWERS * pace_s, LEASE_TTL_MAX_S)


def test_one_that_is_configured_longer_stays_so() -> None:
    assert fitting_ttl_s(60.0, 5.0) == 60.0
    assert fitting_ttl_s(60.0, 5.0, 60.0) == 60.0


@pytest.mark.parametrize(
    ("held_s", "pace_s", "ttl_s"),
    [
        (3.0, 0.6, 6.0),
        (6.0, 0.6, 6.0),
        (6.0, 0.4, 6.0),
        (6.0, 0.25, 3.0),
        (20.0, 1.1, 20.0),
        (20.0, 0.9, 12.0),
        (20, 0, 3),
    ],
)
def test_a_held_one_is_made_longer_at_once_shorter_with_a_margin(held_s: float, pace_s: float, ttl_s: float) -> None:
    assert fitting_ttl_s(LEASE_TTL_S, pace_s, held_s) == ttl_s


def test_a_renewal_waits_as_long_in_the_longest_outage_as_in_a_long_one() -> None:
    """Two to the number of renewals without an answer is no float after 1,023 of them, an hour and a half: it ended the
    threads that renew, so an agent was gone for good once the store was back.
    """
    assert [renewal_timeout_s(3.0, unanswered) for unanswered in (0, 1, 2, 3)] == [1.0, 2.0, 4.0, STORE_CALL_TIMEOUT_S]
    assert renewal_timeout_s(3.0, 100_000) == STORE_CALL_TIMEOUT_S
    assert renewal_timeout_s(60.0, 100_000) == 20.0
