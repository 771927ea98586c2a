"""A simulated cluster whose store answers slowly, for all processes and for long: leases last, and nobody is replaced.

The model is kind: only renewals can come too late, and one that is given up takes no time. What real time does is in
tests/contract/membership/store/test_etcd_faults.py.
"""

from __future__ import annotations

from collections import Counter

import pytest

from chaos.simulation.cluster import Cluster
from membership.store import lease as lease_module
from workers.agent import registrar as registrar_module

pytestmark = pytest.mark.unit

SLOW_FOR_S = 60.0
WHOLE_WITHIN_S = 60.0


def run(seed: str, slow_s: float) -> tuple[Counter[str], list[str]]:
    """Elections by office while the store is slow, and how the requests ended that were sent meanwhile."""
    cluster = Cluster(seed, ("a", "b", "c"), 4)
    settle(cluster)
    elections, elected = Counter[str](), cluster.elected

    def noted(office: str, token: int) -> None:
        elections[office] += 1
        elected(office, token)

    cluster.elected = noted  # type: ignore[method-assign]
    cluster.store.slow_s = slow_s
    sent = [f"r{number}" for number in range(10)]
    for name in sent:
        cluster.gateway.submit(name, [1, 2, 3], 20)
        cluster.clock.run(cluster.clock.now + SLOW_FOR_S / len(sent))
    cluster.store.slow_s = 0.0
    settle(cluster)
    assert cluster.violation is None
    return elections, [cluster.requests[name].ended for name in sent]


def settle(cluster: Cluster) -> None:
    deadline = cluster.clock.now + WHOLE_WITHIN_S
    while trouble := cluster.trouble():
        assert cluster.clock.now < deadline, trouble
        cluster.supervise()
        cluster.clock.run(cluster.clock.now + 0.2)


@pytest.mark.parametrize("slow_s", [0.5, 1.2, 3.0])
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_no_engine_is_replaced_however_long_the_store_is_slow(seed: str, slow_s: float) -> None:
    """Each of the two controllers may lose the lease that it had before: it believes in none beyond its deadline."""
    elections, ended = run(seed, slow_s)
    assert not elections["engine"]
    assert elections["controller"] <= 2
    assert set(ended) <= {"stop", "length"}


def test_with_renewals_and_leases_as_configured_offices_change_hands_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the test above would show nothing."""
    for module in (lease_module, registrar_module):
        monkeypatch.setattr(module, "fitting_ttl_s", lambda configured_s, pace_s, held_s=0.0: configured_s)
        monkeypatch.setattr(module, "renewal_timeout_s", lambda ttl_s, unanswered: ttl_s / 3)
    elections, _ = run("1", 0.5)
    assert elections["engine"] > 10
    assert elections["controller"] > 10
