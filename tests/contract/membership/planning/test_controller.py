"""The running controller on both stores: it brings up, scales and heals a cluster, and of two only one ever acts."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from elastic.serve.etcd_server import EtcdServer
from membership.base.events import Event, EventLog
from membership.planning import planner
from membership.planning.controller import run_controller
from membership.planning.planner import Effect
from membership.store.codec import encode
from membership.store.etcd import connect
from membership.store.in_memory import MemoryStore
from membership.store.interface import Compare, Op, Put, Store, TxnResult
from membership.store.records import ClusterState, LeaderRecord, Phase
from tests.support.helpers import eventually
from tests.support.world import CONFIG, Violation, World

pytestmark = pytest.mark.contract

T = 30.0


class Frozen:
    """A store as a process sees it that may be stopped: while `freeze` is set no call leaves it; then it goes on."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.thaw = threading.Event()
        self.thaw.set()
        self.held = threading.Event()  # a transaction is waiting to be sent

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in ("get", "range", "put", "txn", "grant", "keepalive", "revoke"):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "txn" and not self.thaw.is_set():
                self.held.set()
            assert self.thaw.wait(T), "frozen for too long"
            return method(*args, **kwargs)

        return call


class Driver:
    """A simulated cluster in real time, with real controllers as threads."""

    def __init__(self, store: Store, path: Path, lease_ttl_s: float = 60.0) -> None:
        config = replace(CONFIG, cluster=uuid.uuid4().hex, lease_ttl_s=lease_ttl_s)
        self.world = World(store=store, config=config, elected=False, now=time.time())
        self.path = path

    @contextmanager
    def controller(self, name: str, store: Store | None = None) -> Iterator[threading.Event]:
        """Run a controller; yields what stops it before the end of the block."""
        stop = threading.Event()
        events = EventLog(self.path, "controller")
        args = (store or self.world.store, self.world.keys.cluster, name, stop, events)
        failed: list[BaseException] = []

        def run() -> None:
            try:
                run_controller(*args)
            except BaseException as error:  # noqa: BLE001
                failed.append(error)

        thread = threading.Thread(target=run, name=f"controller-{name}")
        thread.start()
        try:
            yield stop
        finally:
            stop.set()
            thread.join(T)
            assert not thread.is_alive()
        assert not failed, failed

    def until(self, done: Callable[[], object], what: str) -> None:
        """Let agents, ranks and engine act until something is so."""

        def act() -> bool:
            self.world.now = time.time()
            self.world.agents_act()
            self.world.engine_acts()
            return bool(done())

        eventually(act, T, what)

    def whole(self, count: int) -> None:
        """Wait until that many ranks serve and nothing is left over."""

        def is_whole() -> bool:
            try:
                self.world.assert_whole(count)
            except Violation:
                return False
            return True

        self.until(is_whole, f"{count} ranks to serve: {self.world.state.view}")

    def events(self, kind: str) -> list[Event]:
        return [event for event in EventLog.read(self.path) if event.kind == kind]


@pytest.fixture
def driver(store: Store, tmp_path: Path) -> Driver:
    return Driver(store, tmp_path / "events")


def test_a_cluster_is_brought_up_scaled_and_healed(driver: Driver) -> None:
    with driver.controller("one"):
        driver.whole(4)
        for count in (6, 3):
            name = driver.world.scale(count).id
            driver.whole(count)
            driver.until(lambda name=name: driver.world.state.operations[name].phase is Phase.DONE, f"scale to {count}")
        driver.world.kill(1)
        driver.until(lambda: driver.world.serving == (0, 2), "the loss to be durable")
        driver.whole(3)
    assert [event.epoch for event in driver.events("epoch_committed")] == [1, 2, 3, 4, 5]
    assert [e.fields["phase"] for e in driver.events("operation_phase")][:3] == ["spawning", "handshaking", "loading"]
    assert len(driver.events("leader_elected")) == 1


def test_a_standby_takes_over_at_once_from_one_that_stops(driver: Driver) -> None:
    with driver.controller("one") as stop:
        driver.whole(4)
        with driver.controller("two"):
            stop.set()
            eventually(lambda: len(driver.events("leader_elected")) == 2, T, "the other to be elected")
            driver.world.scale(5)
            driver.whole(5)
    tokens = [event.fields["token"] for event in driver.events("leader_elected")]
    assert tokens[0] < tokens[1]


def test_a_controller_that_was_frozen_while_it_acted_is_fenced(store: Store, tmp_path: Path) -> None:
    driver = Driver(store, tmp_path / "events", lease_ttl_s=3.0)
    frozen = Frozen(driver.world.store)
    with driver.controller("one", frozen):  # type: ignore[arg-type]
        driver.whole(4)
        frozen.thaw.clear()
        driver.world.kill(2, backoff_s=0.0)
        try:
            assert frozen.held.wait(T), "it wants to act, and is stopped just before"
            with driver.controller("two"):
                driver.whole(4)
                before = driver.world.state
                frozen.thaw.set()
                eventually(lambda: driver.events("leader_left"), T, "the frozen one to stand down")
                after = driver.world.state
        finally:
            frozen.thaw.set()
    assert (after.view, after.assignments, after.next) == (before.view, before.assignments, before.next)
    elected = [event.fields["node"] for event in driver.events("leader_elected")]
    assert elected[:2] == ["one", "two"]
    assert [event.epoch for event in driver.events("epoch_committed")] == [1, 2, 3]


def test_a_controller_whose_planner_computes_for_longer_than_the_lease_goes_on_leading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewals have their own thread, which gets its turns while the planner computes."""
    driver, decide, took_s = (
        Driver(MemoryStore(), tmp_path / "events", lease_ttl_s=2.0),
        planner.reconcile,
        list[float](),
    )

    def slow(state: ClusterState, now: float) -> list[Effect]:
        effects = decide(state, now)
        if state.view is not None and effects and not took_s:
            began = time.monotonic()
            while time.monotonic() < began + 3 * driver.world.config.lease_ttl_s:
                sorted(range(1000), key=lambda number: -number)
            took_s.append(time.monotonic() - began)
        return effects

    with driver.controller("one"):
        driver.whole(4)
        monkeypatch.setattr(planner, "reconcile", slow)
        with driver.controller("two"):
            driver.world.kill(2, backoff_s=0.0)
            driver.until(lambda: took_s, "the planner's long look")
            driver.whole(4)
            elected = [event.fields["node"] for event in driver.events("leader_elected")]
    assert elected == ["one"], "the other one stood by all the time"
    assert took_s[0] >= 3 * driver.world.config.lease_ttl_s


def test_an_outage_longer_than_the_lease_freezes_membership_and_no_more(tmp_path: Path) -> None:
    store = MemoryStore()
    driver = Driver(store, tmp_path / "events", lease_ttl_s=3.0)
    with driver.controller("one"):
        driver.whole(4)
        driver.world.kill(0)
        store.outage = True
        eventually(lambda: driver.events("leader_left"), T, "the leader to notice that its lease is over")
        store.outage = False
        driver.whole(4)
    assert [event.epoch for event in driver.events("epoch_committed")] == [1, 2, 3]


def test_a_killed_etcd_comes_back_and_the_controller_goes_on(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "etcd") as server:
        store = connect([server.url])
        try:
            driver = Driver(store, tmp_path / "events")
            with driver.controller("one"):
                driver.whole(4)
                driver.world.kill(0)
                server.restart()
                driver.whole(4)
            assert [event.epoch for event in driver.events("epoch_committed")] == [1, 2, 3]
        finally:
            store.close()


def test_a_record_that_changed_since_the_controller_looked_is_not_replaced(tmp_path: Path) -> None:
    """Somebody writes what it is about to write. It looks again, and goes on from there."""
    store = MemoryStore()
    driver = Driver(store, tmp_path / "events")
    prefix, succeeded = f"{driver.world.keys.prefix}assign/", list[bool]()

    class Overtaking:
        """The controller's way to the store."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
            assigns = [op for op in success if isinstance(op, Put) and op.key.startswith(prefix)]
            if assigns and not succeeded:
                store.put(assigns[0].key, assigns[0].value)
            result = store.txn(compares, success, failure)
            if assigns:
                succeeded.append(result.succeeded)
            return result

    with driver.controller("one", Overtaking()):  # type: ignore[arg-type]
        driver.whole(4)
    assert succeeded[0] is False


def test_a_controller_that_is_deposed_just_before_its_transaction_changes_nothing(tmp_path: Path) -> None:
    """Nothing but the leader's key has changed since it looked, so only the fence can stop it."""
    store = MemoryStore()
    driver = Driver(store, tmp_path / "events")
    keys, deposed = driver.world.keys, threading.Event()

    class Deposing:
        """The controller's way to the store. Another controller is elected just before it gives out ranks."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
            assigns = any(isinstance(op, Put) and op.key.startswith(f"{keys.prefix}assign/") for op in success)
            if assigns and not deposed.is_set():
                store.delete(keys.leader)
                store.put(keys.leader, encode(LeaderRecord(node="other", pid=2)))
                deposed.set()
            return store.txn(compares, success, failure)

    with driver.controller("one", Deposing()) as stop:  # type: ignore[arg-type]
        assert deposed.wait(T), "it never gave out ranks"
        eventually(lambda: driver.events("leader_left"), T, "it to stand down")
        stop.set()
    assert not driver.world.state.assignments
