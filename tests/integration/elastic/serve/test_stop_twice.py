"""A second signal hastens the stop of a role and leaves nothing out; the exit status names it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from chaos.target.warm_start import WarmCommands, WarmProcess
from elastic.serve.etcd_server import EtcdServer
from membership.base.rank_id import RankId
from membership.store.interface import Store
from membership.store.keys import Keys
from tests.support.agent_scene import WORKER, Scene
from tests.support.gateway_process import BODY, alive, engine_in, free_port, gateway
from tests.support.helpers import eventually, hang, stopped

pytestmark = pytest.mark.integration

A, B = RankId(0, 1), RankId(1, 2)
SECOND = 128 + signal.SIGTERM
EITHER = (128 + signal.SIGINT, SECOND)


@contextmanager
def role(commands: WarmCommands, etcd: EtcdServer, folder: Path, *command: str) -> Iterator[WarmProcess]:
    """A role command, killed at the end if it still runs."""
    arguments = [*command, "--etcd", etcd.url, "--cluster", "c", "--state-dir", str(folder)]
    process = commands.start(arguments, os.environ, sys.stderr.fileno())
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)
        process.close()


def signal_twice(process: WarmProcess) -> None:
    """Both at once: it is stopped meanwhile, so that it cannot end between them. Either may be the second: `EITHER`."""
    with stopped(process.pid):
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)


@pytest.mark.parametrize("name", ["controller", "engine"])
def test_a_role_gives_up_its_lease_and_says_that_it_was_hastened(
    name: str, commands: WarmCommands, etcd: EtcdServer, store: Store, tmp_path: Path
) -> None:
    Scene(store, tmp_path / "events.jsonl").configure()
    key = Keys("c").leader if name == "controller" else Keys("c").engine
    with role(commands, etcd, tmp_path / "state", name, "--node", "n") as process:
        eventually(lambda: store.get(key), 60.0, f"{name} elected")
        signal_twice(process)
        assert process.wait(timeout=30) in EITHER
    assert store.get(key) is None, "its lease is revoked, not left to expire"


def test_a_role_that_hangs_is_ended_all_the_same(
    commands: WarmCommands, etcd: EtcdServer, store: Store, tmp_path: Path
) -> None:
    """It waits for a store that does not answer."""
    Scene(store, tmp_path / "events.jsonl").configure()
    with role(commands, etcd, tmp_path / "state", "controller", "--node", "n") as process:
        eventually(lambda: store.get(Keys("c").leader), 60.0, "a leader")
        with stopped(etcd.pid):
            signal_twice(process)
            assert process.wait(timeout=30) in (*EITHER, -signal.SIGALRM)


def test_an_agent_ends_its_ranks_at_once_and_waits_for_them(
    commands: WarmCommands, etcd: EtcdServer, store: Store, tmp_path: Path
) -> None:
    """One rank does not react to anything milder than SIGKILL, and nothing is waited for that it could do."""
    scene = Scene(store, tmp_path / "events.jsonl")
    scene.configure()
    command = ("agent", "--node", "n", "--worker-class", WORKER)
    with role(commands, etcd, tmp_path / "state", *command) as process:
        scene.assign(A, B)
        ranks = scene.until_registered(A, B).ranks
        hang(ranks[A].pid)
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert {record.pid for record in ranks.values()} < set(family)
        signal_twice(process)
        assert process.wait(timeout=30) in EITHER
        assert [pid for pid in family if psutil.pid_exists(pid) and running(pid)] == []
    state = scene.state()
    assert (state.agents, state.ranks) == ({}, {}), "their leases are revoked, not left to expire"


def running(pid: int) -> bool:
    """A process that has ended may wait for its new parent to take note."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_gateway_tells_its_clients_and_does_not_wait_for_their_streams(
    commands: WarmCommands, etcd: EtcdServer, tmp_path: Path
) -> None:
    port = free_port()
    with engine_in(etcd, tmp_path), gateway(commands, etcd, tmp_path, port) as running:
        eventually(lambda: alive(port), 30.0, "the gateway to answer")
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=BODY, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            running.process.send_signal(signal.SIGTERM)
            ready = f"http://127.0.0.1:{port}/readyz"
            eventually(lambda: "shutting down" in httpx.get(ready, timeout=30).text, 30.0, "the gateway to drain")
            running.process.send_signal(signal.SIGTERM)
            rest = "".join(lines)
        assert "shutting down" in rest, "an error of ours, not a broken connection"
        assert running.process.wait(timeout=30) == SECOND
