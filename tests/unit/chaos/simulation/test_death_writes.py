"""What one rank's death costs the store: writes in proportion to the hosts, not to the ranks."""

from __future__ import annotations

import pytest

from benchmarks.death_writes import cost_of_death

pytestmark = pytest.mark.unit

BESIDE = 17  # writes that do not depend on the size: exit, masks, views, assignments, the newcomer's phases


@pytest.mark.parametrize(("ranks", "hosts"), [(4, 2), (24, 2), (24, 4)])
def test_a_death_costs_two_writes_per_host_however_many_ranks(ranks: int, hosts: int) -> None:
    """Each host reports once that its ranks have prepared the view without the dead one, and once that with it."""
    cost = cost_of_death(ranks, hosts, "seed")
    assert cost.keys["ranks"] > 2 * (ranks - 1)  # each rank has prepared two views
    assert cost.revisions <= 2 * hosts + BESIDE


@pytest.mark.parametrize("ranks", [4, 24])
def test_renewals_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    """Three times per second and agent, since leases are of a second; and those of the other roles."""
    cost = cost_of_death(ranks, 2, "seed")
    assert cost.renewals <= 3 * (2 + 4)
