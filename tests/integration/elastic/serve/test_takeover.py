"""A cluster on an etcd that outlives its servers: one that was killed is waited out, one that lives is let alone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from elastic.demo.model import shipped_demo_model
from elastic.serve.cluster_config import cluster_config
from elastic.serve.etcd_server import EtcdServer
from elastic.serve.options import ServeOptions
from elastic.serve.predecessor import Predecessor
from elastic.serve.state_dir import ClusterAddress
from elastic.serve.stored_config import write_config
from membership.base.errors import ConfigError
from membership.base.process_stats import command_words
from membership.store.codec import encode
from membership.store.etcd import EtcdStore, connect
from membership.store.interface import Put
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.records import LeaderRecord

pytestmark = pytest.mark.integration

OPTIONS = ServeOptions(model=shipped_demo_model())
CONFIG = cluster_config(OPTIONS)
PROGRAM = "print(flush=True); input()"
KEYS = Keys(CONFIG.cluster)
ETCD = ("external",)
KILLED = Predecessor(ClusterAddress(cluster=CONFIG.cluster, etcd=ETCD), "here", Path("/run/of/this/directory"))
LONG_S = 600.0  # much longer than a start waits: what is waited out is an error


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EtcdStore]:
    with EtcdServer(tmp_path / "etcd") as server, closing(connect([server.url])) as store:
        store.put(KEYS.config, encode(CONFIG))
        yield store


def start(store: EtcdStore, killed: Predecessor | None = None) -> list[str]:
    """What a start on this etcd says."""
    said: list[str] = []
    write_config(store, CONFIG, replace(OPTIONS, etcd=ETCD), said.append, killed)
    return said


@pytest.mark.parametrize("offices", [("leader",), ("engine",), ("leader", "engine")])
def test_one_that_was_killed_is_waited_out(store: EtcdStore, offices: tuple[str, ...]) -> None:
    lease = store.grant(CONFIG.lease_ttl_s)
    store.txn([], [Put(KEYS.prefix + office, b"", lease) for office in offices])
    assert start(store) == [f"cluster '{CONFIG.cluster}' was served until now: up to 5 s until its leases run out"]
    assert all(store.get(KEYS.prefix + office) is None for office in offices)


def test_one_whose_lease_is_longer_than_usual_is_waited_out(store: EtcdStore) -> None:
    """As it is where etcd was slow when it was killed."""
    store.put(KEYS.prefix + "engine", b"", store.grant(2 * CONFIG.lease_ttl_s))
    assert start(store) == [f"cluster '{CONFIG.cluster}' was served until now: up to 8 s until its leases run out"]
    assert store.get(KEYS.prefix + "engine") is None


@pytest.mark.parametrize("office", ["leader", "engine"])
def test_one_that_lives_is_let_alone(store: EtcdStore, office: str) -> None:
    with LeaseKeeper(store, CONFIG.lease_ttl_s) as keeper:
        store.put(KEYS.prefix + office, b"", keeper.lease)
        revision = store.range(KEYS.prefix)[0]
        with pytest.raises(ConfigError, match=f"served by another process.*{office} is renewed"):
            start(store)
        assert store.range(KEYS.prefix)[0] == revision
        assert keeper.alive


def test_nothing_is_waited_for_where_the_last_server_stopped(store: EtcdStore) -> None:
    assert start(store) == []


@contextmanager
def begun(command: list[str], **environ: str) -> Iterator[int]:
    """One that lives, once it says so: before that its command line is empty."""
    environment = {"PATH": os.environ["PATH"], **environ}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        try:
            assert child.stdout is not None
            assert select.select([child.stdout], [], [], 60.0)[0], "it says nothing"
            child.stdout.readline()
            yield child.pid
        finally:
            child.kill()


def process(**environ: str) -> AbstractContextManager[int]:
    """One with this environment."""
    return begun([sys.executable, "-S", "-c", PROGRAM, "controller"], **environ)


def titled(title: str, room: str = "x" * 2000) -> AbstractContextManager[int]:
    """One with a title in place of its command line and environment, as roles that were forked have."""
    program = f"import setproctitle, sys; setproctitle.setproctitle(sys.argv[1]); {PROGRAM}"
    return begun([sys.executable, "-c", program, title], ROOM=room)


@pytest.mark.parametrize("room", ["", "x" * 2000])
def test_the_words_of_a_title_are_those_of_a_command(room: str) -> None:
    with titled("python3 -m elastic.cli engine --node here", room) as pid:
        assert command_words(pid) == ["python3", "-m", "elastic.cli", "engine", "--node", "here"]
    with process() as pid:
        assert command_words(pid) == [sys.executable, "-S", "-c", PROGRAM, "controller"]
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert command_words(pid) == [], "a zombie"
    assert command_words(pid) == []


def hold(store: EtcdStore, node: str, pid: int) -> None:
    lease = store.grant(LONG_S)
    store.put(KEYS.leader, encode(LeaderRecord(node=node, pid=pid)), lease)


def ended() -> int:
    """The pid of a process that was."""
    with process() as pid:
        return pid


def test_one_that_was_killed_here_is_taken_over_at_once(store: EtcdStore) -> None:
    hold(store, "here", ended())
    assert start(store, KILLED) == [f"{KEYS.leader} was held by the server that was killed here: taken over"]
    assert store.get(KEYS.leader) is None


def test_a_role_of_it_that_still_lives_is_fenced(store: EtcdStore) -> None:
    with process(ELASTIC_RUN_DIR=str(KILLED.run)) as pid:
        hold(store, "here", pid)
        assert start(store, KILLED)
        assert store.get(KEYS.leader) is None


def test_what_is_not_its_is_let_alone(store: EtcdStore) -> None:
    """Of another node; of another server on this one; of roles started by hand; of another etcd or cluster."""
    elsewhere = replace(KILLED, address=ClusterAddress(cluster=CONFIG.cluster, etcd=("another",)))
    other = replace(KILLED, address=ClusterAddress(cluster="another", etcd=ETCD))
    with (
        process(ELASTIC_RUN_DIR="/run/of/another") as served,
        process() as by_hand,
        titled("python3 -m elastic.cli engine --node here") as forked,
    ):
        for node, pid, killed in (
            ("there", ended(), KILLED),
            ("here", served, KILLED),
            ("here", by_hand, KILLED),
            ("here", forked, KILLED),
            ("here", ended(), elsewhere),
            ("here", ended(), other),
        ):
            hold(store, node, pid)
            assert killed.fence(store, [KEYS.engine]) == []
            if killed is KILLED:
                assert killed.fence(store, [KEYS.leader, KEYS.engine]) == []
            else:
                assert not killed.served(CONFIG.cluster, ETCD)
            assert store.get(KEYS.leader) is not None
