"""A role that could not work in a cluster of several hosts ends at once and says why; one that comes first waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import pytest
from msgspec.structs import replace as replace_in

from elastic.demo.model import shipped_demo_model
from elastic.engine.role import run_terms
from elastic.gateway.admin_token import AdminToken
from elastic.gateway.app import GatewaySettings, run_gateway
from elastic.serve.etcd_server import EtcdServer
from elastic.serve.init_config import run_init
from elastic.serve.join_secret import ENV
from elastic.serve.options import InitOptions
from elastic.serve.state_dir import ClusterAddress
from membership.base.errors import ConfigError, StoreUnavailable
from membership.base.events import EventLog
from membership.base.network import Network
from membership.planning.controller import run_controller
from membership.store.codec import encode
from membership.store.etcd import EtcdStore, connect
from membership.store.in_memory import MemoryStore
from membership.store.keys import Keys
from membership.store.mirror import Mirror
from membership.store.records import ClusterConfig
from workers.agent.agent import run_agent
from workers.queue.network import join_key, require_joined

pytestmark = pytest.mark.integration

KEY = join_key(Network("10.0.0.1", "moe", b"a secret of the tests' cluster"))
CONFIG = ClusterConfig(cluster="moe", model="m", served_model_name="m", moe_layers=1, experts=2, join_key=KEY)
Role = Callable[[MemoryStore, threading.Event, Path], None]


def agent(store: MemoryStore, stop: threading.Event, folder: Path) -> None:
    run_agent(store, "moe", "n", stop, EventLog(folder / "events.jsonl", "agent"))


def controller(store: MemoryStore, stop: threading.Event, folder: Path) -> None:
    admit = partial(require_joined, network=None)
    run_controller(store, "moe", "n", stop, EventLog(folder / "events.jsonl", "controller"), admit=admit)


def engine(store: MemoryStore, stop: threading.Event, folder: Path) -> None:
    run_terms(store, "moe", "n", stop, EventLog(folder / "events.jsonl", "engine"))


def gateway(store: MemoryStore, stop: threading.Event, folder: Path) -> None:
    run_gateway(store, "moe", GatewaySettings("g", folder, AdminToken("t")), stop, EventLog(folder / "e", "gateway"))


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    with closing(MemoryStore()) as store:
        yield store


@pytest.mark.parametrize("role", [controller, agent, engine, gateway])
def test_a_role_without_an_address_waits_for_the_cluster_and_then_says_what_it_lacks(
    role: Role, store: MemoryStore, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as roles:
        running = roles.submit(role, store, threading.Event(), tmp_path)
        store.put(Keys("moe").config, encode(CONFIG))
        with pytest.raises(ConfigError, match="'moe' spans hosts, and this role has no --advertise"):
            running.result(timeout=60)


@pytest.mark.parametrize("role", [controller, agent, engine, gateway])
def test_one_that_is_stopped_before_there_is_a_cluster_ends(role: Role, store: MemoryStore, tmp_path: Path) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(1) as roles:
        running = roles.submit(role, store, stop, tmp_path)
        stop.set()
        assert running.result(timeout=60) is None


def test_an_engine_is_ready_once_it_could_take_over(store: MemoryStore, tmp_path: Path) -> None:
    """So a rolling update ends no engine before another one stands by; without a cluster none does."""
    stop, reported = threading.Event(), SimpleQueue[str]()
    events = EventLog(tmp_path / "events.jsonl", "engine")
    with ThreadPoolExecutor(2) as roles:
        for _ in range(2):
            roles.submit(run_terms, store, "moe", "n", stop, events, None, reported.put)
        try:
            assert reported.empty()
            store.put(Keys("moe").config, encode(replace_in(CONFIG, join_key="")))
            assert [reported.get(timeout=60) for _ in range(2)] == ["", ""], "also the one that only stands by"
        finally:
            stop.set()


def test_init_waits_for_an_etcd_that_does_not_answer_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As roles do: on Kubernetes all of them start at the same time."""
    monkeypatch.setenv(ENV, "a secret of the tests' cluster")
    silent, reached, said = [StoreUnavailable("no answer")], ClusterAddress.connect, list[str]()

    def reach(address: ClusterAddress, seen: str = "") -> EtcdStore:
        if silent:
            raise silent.pop()
        return reached(address, seen=seen)

    monkeypatch.setattr(ClusterAddress, "connect", reach)
    with EtcdServer(tmp_path / "etcd") as server:
        run_init(InitOptions(model=shipped_demo_model(), cluster="moe", ranks=2, etcd=(server.url,)), said.append)
    assert said == ["cluster 'moe' may begin, with 2 ranks"]


def test_init_says_what_it_did_and_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real etcd: the join secret's public half is in the config, so that roles know that they span hosts."""
    monkeypatch.setenv(ENV, "a secret of the tests' cluster")
    said: list[str] = []
    options = InitOptions(model=shipped_demo_model(), cluster="moe", ranks=2, redundancy=2)
    with pytest.raises(ConfigError, match="needs --etcd"):
        run_init(options, said.append)
    with EtcdServer(tmp_path / "etcd") as server:
        for _ in range(2):
            run_init(replace(options, etcd=(server.url,)), said.append)
        with closing(connect([server.url])) as store, Mirror(store, "moe") as mirror:
            config, desired = mirror.state().config, mirror.state().desired
    assert said == ["cluster 'moe' may begin, with 2 ranks", "cluster 'moe' is there already: nothing is changed"]
    assert (config and config.join_key, desired and desired.ranks) == (KEY, 2)
