"""A role that starts before its etcd answers waits for it: on Kubernetes both start at the same time."""

from __future__ import annotations

import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from structlog.testing import capture_logs

from chaos.target.warm_start import WarmCommands
from elastic.serve.etcd_server import EtcdServer, free_ports
from elastic.serve.role_main import connected, reach_store
from elastic.serve.state_dir import ClusterAddress
from membership.base.errors import ConfigError, StoreDenied, StoreUnavailable
from membership.base.run_dir import ENV as RUN_DIR_ENV
from membership.base.run_dir import run_dir
from membership.base.timing import STORE_AWAITED_S
from membership.store.etcd import EtcdStore, connect
from membership.store.keys import Keys
from tests.support.agent_scene import Scene
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration


def test_an_etcd_that_comes_later_is_awaited(tmp_path: Path) -> None:
    ports = free_ports(2)
    tried = threading.Event()

    def attempt() -> EtcdStore:
        try:
            return connected(ClusterAddress(cluster="c", etcd=(f"http://127.0.0.1:{ports[0]}",)))
        finally:
            tried.set()

    with ThreadPoolExecutor(1) as roles, capture_logs() as logs:
        reaching = roles.submit(reach_store, attempt, threading.Event())
        assert tried.wait(timeout=30)
        server = EtcdServer(tmp_path / "etcd", ports=(ports[0], ports[1]))
        with server, closing(reaching.result(timeout=60)) as store:
            store.put("/k", b"v")
    assert {(each["event"], each["wait_s"]) for each in logs} == {("store_awaited", STORE_AWAITED_S)}
    assert f"http://127.0.0.1:{ports[0]} cannot be reached: Connection refused" in logs[0]["error"]


def test_a_role_is_started_before_its_etcd(commands: WarmCommands, tmp_path: Path) -> None:
    client, peer = free_ports(2)
    where = ["--etcd", f"http://127.0.0.1:{client}", "--cluster", "c", "--state-dir", str(tmp_path / "state")]
    log, run = tmp_path / "log", run_dir(tmp_path / "state")
    alone = {name: value for name, value in os.environ.items() if name != RUN_DIR_ENV}
    with log.open("wb") as out:
        process = commands.start(["controller", "--node", "n", *where], alone, out.fileno())
    try:
        eventually(lambda: b"store_awaited" in log.read_bytes(), 60.0, "it to say what it waits for")
        with EtcdServer(tmp_path / "etcd", ports=(client, peer)) as etcd, closing(connect([etcd.url])) as store:
            Scene(store, tmp_path / "events.jsonl").configure()
            eventually(lambda: store.get(Keys("c").leader), 60.0, "it to lead")
            assert run.is_dir()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
            assert not run.exists(), "who was started by itself leaves no directory behind"
    finally:
        process.kill()
        process.wait(timeout=30)
        process.close()


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


def test_a_name_that_nobody_knows_is_awaited_too_and_named_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Kubernetes a name is known once its pod is ready."""
    refused = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "create_connection", Mock(side_effect=refused))
    address = ClusterAddress(cluster="c", etcd=("http://etcd:2379",))
    says = r"http://etcd:2379 cannot be reached: Name or service not known \(waited for 0.01 s\)"
    with pytest.raises(StoreUnavailable, match=says) as raised:
        reach_store(partial(connected, address), threading.Event(), wait_s=0.01)
    assert raised.value.hint == "is it running, and is that its address?"


def test_what_no_wait_mends_is_told_at_once() -> None:
    address = ClusterAddress(cluster="c", etcd=("http://127.0.0.1:1", "https://127.0.0.1:1"))
    with pytest.raises(ConfigError, match="all http, all https"):
        reach_store(partial(connected, address), threading.Event())


def test_without_a_wait_there_is_one_try() -> None:
    asked: list[int] = []

    def attempt() -> EtcdStore:
        asked.append(1)
        raise StoreUnavailable("no answer")

    with pytest.raises(StoreUnavailable, match=r"^no answer$"):
        reach_store(attempt, threading.Event(), wait_s=0.0)
    assert asked == [1]
