"""The embedded etcd: it starts, comes back after a crash, and never outlives its owner."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from elastic.serve.etcd_server import ANY_PORT_RANGE, ENV_BINARY, EtcdServer, find_binary, free_ports
from membership.base.errors import ConfigError, StoreUnavailable
from membership.store.etcd import EtcdStore, connect
from tests.support.helpers import eventually, hang
from tests.support.other_user import NEEDS_ROOT, UID, run_as

pytestmark = pytest.mark.integration

T = 30.0


def test_it_keeps_its_data_and_ports_over_a_crash(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "e") as server:
        url, first = server.url, server.pid
        with closing(connect([url])) as store:
            store.put("/a", b"kept")
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not server.alive, T, "etcd to be dead")
        server.restart()
        assert server.url == url
        assert server.pid != first
        with closing(connect([url])) as store:
            kv = store.get("/a")
            assert kv is not None
            assert kv.value == b"kept"
        again = server.pid
    assert not psutil.pid_exists(again)
    assert not server.alive


def test_a_free_port_is_none_that_a_process_gets_which_takes_any() -> None:
    """Nor does it give one twice."""
    below = int(ANY_PORT_RANGE.read_text().split()[0])
    ports = [port for _ in range(20) for port in free_ports(3)]
    assert len(set(ports)) == 60
    assert 1024 < min(ports) < max(ports) < below


def test_on_sockets_it_listens_nowhere_else_and_leaves_no_file(tmp_path: Path) -> None:
    run = tmp_path / "run of ü 100%"
    run.mkdir(mode=0o700)
    with EtcdServer(tmp_path / "e", sockets=run) as server:
        url = server.url
        assert url.startswith("unix:///")
        with closing(connect([url])) as store:
            store.put("/a", b"kept")
            server.kill()
            server.restart()
            eventually(lambda: read(store) == b"kept", T, "the same store to answer")
        process = psutil.Process(server.pid)
        assert server.url == url
        assert not [each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
        listening = {each.laddr for each in process.net_connections("unix") if each.laddr and each.laddr[0] != "@"}
        assert len(listening) == len(list(run.iterdir())) == 2
    assert list(run.iterdir()) == []


def read(store: EtcdStore) -> bytes | None:
    try:
        kv = store.get("/a")
    except StoreUnavailable:
        return None
    return kv.value if kv is not None else None


@NEEDS_ROOT
def test_another_user_cannot_reach_its_sockets(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as made, EtcdServer(tmp_path / "e", sockets=Path(made)) as server:
        for name in ("etcd.sock:0", "etcd-peer.sock:0"):
            reach = f"socket.socket(socket.AF_UNIX).connect({str(Path(made) / name)!r})"
            assert "PermissionError" in run_as(UID, reach, "import socket").stderr
            assert run_as(0, reach, "import socket").stderr == ""
        told = run_as(UID, f"connect([{server.url!r}])", "from membership.store.etcd import connect").stderr
        assert f"ConfigError: user {UID} may not connect to etcd" in told
        assert server.alive


def test_the_next_server_finds_the_data_of_the_last(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "e") as server, closing(connect([server.url])) as store:
        store.put("/a", b"kept")
    with EtcdServer(tmp_path / "e") as server, closing(connect([server.url])) as store:
        assert store.get("/a") is not None
    assert stat.S_IMODE((tmp_path / "e").stat().st_mode) == 0o700


def test_starting_twice_is_one_server(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "e") as server:
        pid = server.pid
        server.start()
        assert server.pid == pid


def test_a_stopped_server_can_be_stopped_for_good(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "e")
    server.start()
    hang(server.pid)
    assert server.alive
    server.stop()
    assert not psutil.pid_exists(server.pid)
    server.stop()


def test_it_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """The kernel's parent-death signal comes when the starting *thread* ends."""
    server = EtcdServer(tmp_path / "e")
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join(T)
    with closing(connect([server.url])) as store:
        store.put("/a", b"")
    assert server.alive
    server.stop()


def test_it_dies_with_a_killed_owner(tmp_path: Path) -> None:
    code = (
        "import sys, threading; from elastic.serve.etcd_server import EtcdServer\n"
        f"s = EtcdServer({str(tmp_path / 'e')!r}); s.start(); print(s.pid, flush=True); threading.Event().wait(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        if owner.stdout is None:
            raise AssertionError("no pipe")
        etcd = psutil.Process(int(owner.stdout.readline()))
        assert etcd.is_running()
        owner.kill()
        owner.wait(T)
        eventually(lambda: has_ended(etcd), T, "etcd to die as well")


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_two_servers_may_not_share_a_directory(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "e") as server:
        with pytest.raises(StoreUnavailable, match="not healthy within 2 s") as caught:
            EtcdServer(tmp_path / "e").start(timeout_s=2.0)
        assert "another etcd" in caught.value.hint
        assert server.alive


def test_what_etcd_said_is_in_the_error(tmp_path: Path) -> None:
    broken = tmp_path / "etcd"
    broken.write_text("#!/bin/sh\necho the disk is on fire\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(StoreUnavailable, match="ended at start: the disk is on fire"):
        EtcdServer(tmp_path / "e", binary=str(broken)).start()


def test_the_binary_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = tmp_path / "etcd"
    on_path.write_text("")
    on_path.chmod(0o755)
    monkeypatch.delenv(ENV_BINARY, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary() == str(on_path)
    monkeypatch.setenv(ENV_BINARY, sys.executable)
    assert find_binary() == sys.executable
    monkeypatch.setenv(ENV_BINARY, str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="missing is not an executable"):
        find_binary()


def test_no_binary_anywhere_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_BINARY, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        find_binary()
    assert "elastic-ep[embedded]" in caught.value.hint
