"""A cluster whose way to etcd is bad in every way, one after another: serving goes on, and so does membership after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from chaos.faults.members import ProxiedEtcd, ProxiedSite
from chaos.faults.proxied import FAULTS as PROXY_FAULTS
from chaos.faults.store import FAULTS as STORE_FAULTS
from chaos.workload.streams import Workload
from elastic.cli.client import StoreClient
from membership.base.errors import StoreUnavailable
from membership.operations.change import scale
from membership.store.etcd import connect
from tests.e2e.conftest import Serve
from tests.e2e.test_outages import grown
from tests.support.helpers import eventually
from tests.support.served import CALM, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS = 2
T = 60.0
HOLE_S = 5.0  # leases run out meanwhile
STORM_S = 2.0


@contextmanager
def in_force(site: ProxiedSite, fault: str) -> Iterator[None]:
    """The fault during the block."""
    injector = (PROXY_FAULTS | STORE_FAULTS)[fault].injector(site, "etcd")
    injector.inject()
    try:
        yield
    finally:
        injector.heal()


def served(workload: Workload, for_s: float) -> None:
    """Requests end, and `for_s` passes."""
    ended, until = len(workload.records()), time.monotonic() + for_s
    eventually(lambda: len(workload.records()) > ended + 4, T, "requests ending")
    eventually(lambda: time.monotonic() > until, T, "the fault to have lasted")


def thaw(past: StoreClient, workload: Workload) -> None:
    """Wait until the offices that lapsed in an outage are taken again, or by others, and requests end under them.

    An engine that has just taken office needs the store to attach ranks, and the gateway to learn of the engine:
    another outage before that ends serving.
    """
    eventually(lambda: thawed(past), T, "the offices to be taken after an outage")
    served(workload, 0.0)


def thawed(past: StoreClient) -> bool:
    """Whether a controller leads, agents are on record, and ranks follow the engine in office."""
    state = past.state()
    if not (state.leader_revision and state.agents and state.view is not None and state.engine_status is not None):
        return False
    return (state.engine_status.token, state.engine_status.epoch) == (state.engine_token, state.view.epoch)


def test_serving_goes_on_whatever_the_way_to_etcd_is_like(serve: Serve, demo_model: Path, tmp_path: Path) -> None:
    with ProxiedEtcd(tmp_path / "etcd", flags={"quota-backend-bytes": str(8 << 20)}) as etcd:
        cluster = serve(demo_model, RANKS, ("--etcd", etcd.url))
        cluster.wait_serving(RANKS)
        with under_load(cluster, CALM) as workload, closing(connect([etcd.server.url])) as store:
            site, before = ProxiedSite(cluster, etcd), cluster.status()
            past = StoreClient(store, cluster.state.address().cluster, cluster.state.events)  # the proxy
            with in_force(site, "net-black-hole"):
                served(workload, HOLE_S)
                assert past.status()["epoch"] == before["epoch"]
            thaw(past, workload)
            with in_force(site, "net-reset"):
                served(workload, STORM_S)
            thaw(past, workload)
            with in_force(site, "net-delay"):
                eventually(lambda: grown(cluster, RANKS + 1), T, "a scale up over a slow way")
                cluster.wait_serving(RANKS + 1)
            with in_force(site, "etcd-full"):
                served(workload, STORM_S)
                with pytest.raises(StoreUnavailable, match="space exceeded"):
                    past.propose(scale(RANKS), op_id=None, if_epoch=None, timeout_s=T)
            eventually(lambda: grown(cluster, RANKS), T, "a scale down when there is room")
            after = cluster.wait_serving(RANKS)
        pids = [[rank["pid"] for rank in status["ranks"]] for status in (before, after)]
        assert pids[0] == pids[1]
        cluster.__exit__()
