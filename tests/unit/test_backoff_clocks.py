"""A backoff is kept where clocks are about right, and never becomes hours where one of them is wrong."""

from __future__ import annotations

import pytest

from membership.census import Census
from membership.types import ClusterConfig, ClusterState, Desired, RankExit

pytestmark = pytest.mark.unit

CONFIG = ClusterConfig(cluster="c", model="m", served_model_name="m", moe_layers=1, experts=4)
STATE = ClusterState(revision=1, config=CONFIG, desired=Desired(ranks=2))
LAST = RankExit(rank=1, incarnation=2, reason="killed", at=1000.0, not_before=1000.5)


@pytest.mark.parametrize(
    ("now", "waits"),
    [
        (1000.0, True),
        (1000.49, True),
        (1000.5, False),
        (999.0, True),  # the agent's clock is a second ahead: that may be
        (1003.0, False),
        (997.0, False),  # the controller's is far behind: it would wait for as long as that
        (1000.0 - 3600, False),
    ],
)
def test_how_long_a_slot_backs_off(now: float, waits: bool) -> None:
    assert Census(STATE, now).backs_off(LAST) == waits
