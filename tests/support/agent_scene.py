"""A store, an agent with small workers in a thread, and a stand-in for controller and engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from membership.base.events import Event, EventLog
from membership.base.rank_id import RankId
from membership.store.codec import encode
from membership.store.interface import Store
from membership.store.keys import Keys, state_from
from membership.store.records import (
    Assignment,
    ClusterConfig,
    ClusterState,
    EngineRecord,
    EngineStatus,
    Member,
    RankSpec,
    View,
)
from tests.support.helpers import eventually
from workers.agent.agent import AgentOptions, run_agent
from workers.queue.message_queue import MessageQueue

WORKER = "tests.support.small_worker:SmallWorker"
KEYS = Keys("c")


class Scene:
    """What a test says to and sees of an agent."""

    def __init__(self, store: Store, path: Path, node: str = "n") -> None:
        self.store, self.path, self.node = store, path, node

    def state(self) -> ClusterState:
        revision, items = self.store.range(KEYS.prefix)
        return state_from(items, revision)

    def until(self, predicate: Callable[[ClusterState], object], what: str, timeout_s: float = 20) -> ClusterState:
        """The first state for which `predicate` holds."""

        def holds() -> ClusterState | None:
            state = self.state()
            return state if predicate(state) else None

        found = eventually(holds, timeout_s, what)
        assert found is not None
        return found

    def configure(self, faults: str = "", **more: float) -> None:
        config = ClusterConfig(
            cluster="c", model=faults, served_model_name="m", moe_layers=1, experts=2, **more  # type: ignore[arg-type]
        )  # fmt: skip
        self.store.put(KEYS.config, encode(config))

    def assign(self, *keys: RankId) -> None:
        """As the controller does, once the agent is there."""
        me = self.until(lambda s: self.node in s.agents, "the agent's record").agents[self.node]
        ranks = tuple(RankSpec(rank=rank, incarnation=incarnation) for rank, incarnation in keys)
        assignment = Assignment(node=self.node, ranks=ranks, agent_started=me.started)
        self.store.put(KEYS.assign(self.node), encode(assignment))

    def until_registered(self, *keys: RankId) -> ClusterState:
        return self.until(lambda s: all(k in s.ranks and s.ranks[k].exchange_handle for k in keys), f"{keys} there", 60)

    def stage(self, epoch: int, *keys: RankId) -> int:
        """Stage a view; its revision."""
        members = tuple(Member(rank=rank, node=self.node, incarnation=incarnation) for rank, incarnation in keys)
        return self.store.put(KEYS.next, encode(View(epoch=epoch, members=members)))

    def commit(self) -> None:
        view = self.state().next
        assert view is not None
        self.store.put(KEYS.view, encode(view))
        self.store.delete(KEYS.next)

    def elect(self, steps: MessageQueue, lease: int = 0) -> int:
        """Write an engine's record; its token."""
        self.store.delete(KEYS.engine)
        record = EngineRecord(
            node="n", pid=1, address="", broadcast_handle=steps.export_handle().encode(), mask_handle=b"mask"
        )
        self.store.put(KEYS.engine, encode(record))
        return self.state().engine_token

    def engine_runs(self, token: int, epoch: int) -> None:
        self.store.put(KEYS.engine_status, encode(EngineStatus(token=token, epoch=epoch)))

    def events(self, kind: str) -> list[Event]:
        return [event for event in EventLog.read(self.path) if event.kind == kind]


@contextmanager
def agent(
    scene: Scene, spares: int = 0, report: Callable[[str], None] = lambda lacking: None, killable: bool = False
) -> Iterator[threading.Thread]:
    """A running agent, in a thread; what it raised is raised here."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            options = AgentOptions(WORKER, spares, report=report, killable=killable)
            run_agent(scene.store, "c", scene.node, stop, EventLog(scene.path, "agent", "c"), options)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    thread = threading.Thread(target=run, name="agent-under-test")
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(timeout=40)
        assert not thread.is_alive(), "the agent did not stop"
        if failures:
            raise failures[0]
