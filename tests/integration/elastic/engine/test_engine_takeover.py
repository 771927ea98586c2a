"""Engines as processes over a real etcd: one is killed and another goes on, token for token; etcd itself goes away."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic.engine.role import run_terms
from elastic.serve.etcd_server import EtcdServer
from membership.base.errors import StoreUnavailable
from membership.base.events import EventLog
from membership.store.in_memory import MemoryStore
from membership.store.interface import KeyValue, Store
from tests.support import ROOT
from tests.support.helpers import eventually
from tests.support.standins import Gateway, StandInCluster, cluster_config

pytestmark = pytest.mark.integration


class EngineProcess:
    """One engine, in office or standing by."""

    def __init__(self, url: str, events: Path) -> None:
        self.events = events
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.engine_process", url, str(events)], cwd=ROOT
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.kill()
                raise


def elected(engine: EngineProcess) -> int:
    """The engine's token, once it is in office."""
    found = eventually(
        lambda: [e for e in EventLog.read(engine.events) if e.kind == "engine_elected"], 60.0, "an election"
    )
    return int(found[-1].fields["token"])


@contextmanager
def streaming(
    cluster: StandInCluster, engine: EngineProcess, *, requests: int, tokens: int
) -> Iterator[tuple[int, Gateway]]:
    """Two ranks behind `engine`, and a gateway whose requests are under way; the engine's token with it."""
    cluster.configure()
    gateway = Gateway(cluster)
    try:
        token = elected(engine)
        cluster.spawn(0, 1)
        cluster.attach()
        cluster.commit(0, 1)
        cluster.adopted()
        gateway.connect()
        gateway.submit(requests, tokens)
        gateway.pump(lambda: gateway.emitted() > tokens // 8, what="tokens")
        yield token, gateway
    finally:
        gateway.close()
        engine.close()
        cluster.close()


def end_the_term(store: Store, cluster: StandInCluster) -> None:
    """Revoke the lease of the engine in office."""
    record = store.get(cluster.keys.engine)
    assert record is not None
    store.revoke(record.lease)


def resume(cluster: StandInCluster, gateway: Gateway) -> None:
    """Have ranks and gateway find the engine in office, and all requests end as they should."""
    cluster.attach()
    gateway.connect()
    gateway.finish()


def test_a_standby_takes_over_from_a_killed_engine(etcd: EtcdServer, store: Store, tmp_path: Path) -> None:
    cluster = StandInCluster(store, cluster_config(lease_ttl_s=10.0))
    first = EngineProcess(etcd.url, tmp_path / "first.jsonl")
    with streaming(cluster, first, requests=8, tokens=100) as (token, gateway):
        second = EngineProcess(etcd.url, tmp_path / "second.jsonl")
        try:
            first.kill()
            end_the_term(store, cluster)  # as the supervisor does for a role that died
            assert elected(second) > token
            eventually(lambda: cluster.state().engine_token > token, 30.0, "the second engine's record")
            resume(cluster, gateway)
        finally:
            second.close()


def test_a_standby_elected_before_the_records_are_back_masks_no_rank(
    etcd: EtcdServer, store: Store, tmp_path: Path
) -> None:
    """An outage let the ranks' records lapse; the engine died in it; the agents write again only after the election."""
    cluster = StandInCluster(store, cluster_config(lease_ttl_s=15.0))
    first = EngineProcess(etcd.url, tmp_path / "first.jsonl")
    with streaming(cluster, first, requests=4, tokens=60) as (token, gateway):
        second = EngineProcess(etcd.url, tmp_path / "second.jsonl")
        try:
            cluster.assign()
            for rank, mine in cluster.ranks.items():
                store.delete(cluster.keys.rank(rank, mine.record.incarnation))
            first.kill()
            end_the_term(store, cluster)
            assert elected(second) > token
            eventually(lambda: publications(store, cluster) > 2, 30.0, "the second engine to look, and look again")
            status = cluster.state().engine_status
            assert status is not None
            assert (status.epoch, status.masked) == (0, ())
            cluster.attach()
            cluster.adopted()
            status = cluster.state().engine_status
            assert status is not None
            assert status.masked == ()
            gateway.connect()
            gateway.finish()
        finally:
            second.close()


def publications(store: Store, cluster: StandInCluster) -> int:
    """How often the engine in office has published its status."""
    found = store.get(cluster.keys.engine_status)
    return found.version if found is not None else 0


def test_an_engine_that_lost_its_lease_takes_office_again_in_the_same_process(
    etcd: EtcdServer, store: Store, tmp_path: Path
) -> None:
    cluster = StandInCluster(store, cluster_config(lease_ttl_s=10.0))
    engine = EngineProcess(etcd.url, tmp_path / "events.jsonl")
    with streaming(cluster, engine, requests=8, tokens=100) as (token, gateway):
        end_the_term(store, cluster)  # as etcd does after it was held up for longer than the TTL
        eventually(lambda: cluster.state().engine_token > token, 30.0, "another term")
        after = cluster.state().engine
        assert after is not None
        assert after.pid == engine.process.pid
        resume(cluster, gateway)


def test_serving_goes_on_while_etcd_is_down_for_longer_than_the_lease(
    etcd: EtcdServer, store: Store, tmp_path: Path
) -> None:
    cluster = StandInCluster(store, cluster_config(lease_ttl_s=4.0), step_s=0.03)
    engine = EngineProcess(etcd.url, tmp_path / "events.jsonl")
    with streaming(cluster, engine, requests=4, tokens=180) as (token, gateway):
        etcd.stop()
        gateway.finish()
        etcd.restart()
        eventually(
            lambda: (s := cluster.state().engine_status) and s.token == token and s.running == 0,
            60.0,
            "the same engine's status after the outage",
        )


class Away(MemoryStore):
    """A store that does not answer the first questions."""

    def __init__(self, answered: threading.Event) -> None:
        super().__init__()
        self.asked, self.answered = 0, answered

    def range(self, prefix: str) -> tuple[int, tuple[KeyValue, ...]]:
        self.asked += 1
        if self.asked < 3:
            raise StoreUnavailable("it is away")
        self.answered.set()
        return super().range(prefix)


def test_a_term_that_cannot_begin_without_the_store_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that stood down while the store is away does not die of it."""
    monkeypatch.setattr("elastic.engine.role.CAMPAIGN_SLICE_S", 0.01)
    answered = threading.Event()
    store = Away(answered)
    run_terms(store, "test", "n", answered, EventLog(tmp_path / "events.jsonl", "engine"))
    assert store.asked == 3
    store.close()
