"""A role that starts before its etcd answers waits for it: on Kubernetes both start at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from elastic.serve.etcd_server import EtcdServer, free_ports
from elastic.serve.role_main import reach_store
from membership.base.errors import StoreDenied, StoreUnavailable
from membership.store.etcd import EtcdStore, connect
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration


def test_an_etcd_that_comes_later_is_awaited(tmp_path: Path) -> None:
    ports = free_ports(2)
    tried = threading.Event()

    def attempt() -> EtcdStore:
        try:
            return connect([f"http://127.0.0.1:{ports[0]}"])
        finally:
            tried.set()

    with ThreadPoolExecutor(1) as roles, capture_logs() as logs:
        reaching = roles.submit(reach_store, attempt, threading.Event())
        assert tried.wait(timeout=30)
        server = EtcdServer(tmp_path / "etcd", ports=(ports[0], ports[1]))
        with server, closing(reaching.result(timeout=60)) as store:
            store.put("/k", b"v")
    assert {each["event"] for each in logs} == {"store_awaited"}


def test_a_role_that_is_stopped_waits_no_longer() -> None:
    stop = threading.Event()
    asked: list[int] = []

    def attempt() -> EtcdStore:
        asked.append(1)
        raise StoreUnavailable("no answer")

    with ThreadPoolExecutor(1) as roles:
        reaching = roles.submit(reach_store, attempt, stop)
        eventually(lambda: len(asked) > 1, 30, "another try")
        stop.set()
        with pytest.raises(StoreUnavailable):
            reaching.result(timeout=60)


def test_a_user_that_is_denied_is_told_at_once() -> None:
    def attempt() -> EtcdStore:
        raise StoreDenied("another password")

    with pytest.raises(StoreDenied):
        reach_store(attempt, threading.Event())
