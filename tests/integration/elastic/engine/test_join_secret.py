"""An engine whose cluster goes over to another join secret: it listens with that in its next term, if it has it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from elastic.engine.role import run_terms
from membership.base.events import EventLog
from membership.base.network import Network
from membership.store.codec import encode
from membership.store.in_memory import MemoryStore
from membership.store.keys import Keys, state_from
from membership.store.records import ClusterState, EngineRecord
from tests.support.helpers import eventually
from tests.support.world import CONFIG
from workers.queue.network import Purpose, join_key, listening_keys

pytestmark = pytest.mark.integration

WAIT_S = 60.0
OLD, NEW = (
    Network("127.0.0.1", CONFIG.cluster, secret) for secret in (b"the first secret of it", b"the second of it all")
)


class Running:
    """The engine role in a thread, with a store of its own."""

    def __init__(self, folder: Path) -> None:
        self.keys, self.store = Keys(CONFIG.cluster), MemoryStore()
        self.file, self.events = folder / "secrets", folder / "events.jsonl"
        self.file.write_bytes(OLD.secret)
        self.name(OLD)

    def name(self, network: Network) -> None:
        """The config names this secret."""
        self.store.put(self.keys.config, encode(replace(CONFIG, join_key=join_key(network))))

    @property
    def state(self) -> ClusterState:
        revision, items = self.store.range(self.keys.prefix)
        return state_from(items, revision)

    def run(self, stop: threading.Event) -> None:
        network = Network("127.0.0.1", CONFIG.cluster, OLD.secret, file=self.file)
        run_terms(self.store, CONFIG.cluster, "n", stop, EventLog(self.events, "engine"), network)

    def listening(self, network: Network) -> EngineRecord:
        """Its record, once it listens with this secret."""

        def found() -> EngineRecord | None:
            engine = self.state.engine
            return engine if engine is not None and engine.join_key == join_key(network) else None

        engine = eventually(found, WAIT_S, "an engine that listens with this secret")
        assert engine.remote_key == listening_keys(network, Purpose.GATEWAYS).public
        return engine

    def has(self, *networks: Network) -> None:
        """Wait until it says that it has these."""
        wanted = {join_key(network) for network in networks}

        def said() -> bool:
            status = self.state.engine_status
            return status is not None and set(status.join_keys) == wanted

        eventually(said, WAIT_S, "what the engine says it has")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Running]:
    running, stop = Running(tmp_path), threading.Event()
    with closing(running.store), ThreadPoolExecutor(1) as threads:
        ended = threads.submit(partial(running.run, stop))
        try:
            yield running
        finally:
            stop.set()
            ended.result(timeout=WAIT_S)


def test_it_begins_a_term_with_the_secret_that_the_config_names(engine: Running) -> None:
    before = engine.listening(OLD)
    engine.has(OLD)
    engine.file.write_bytes(OLD.secret + b"\n" + NEW.secret)
    engine.has(OLD, NEW)
    engine.name(NEW)
    after = engine.listening(NEW)
    assert after.remote != before.remote
    engine.has(OLD, NEW)
    kinds = [event.kind for event in EventLog.read(engine.events)]
    assert kinds.count("engine_rekeyed") == 1
    assert "engine_stood_down" not in kinds, "nothing was fenced"


def test_one_that_lacks_it_serves_on_until_it_has_it(engine: Running) -> None:
    before = engine.listening(OLD)
    engine.name(NEW)
    engine.file.write_bytes(OLD.secret + b"\n")
    engine.has(OLD)
    assert engine.state.engine == before
    engine.file.write_bytes(NEW.secret)
    engine.listening(NEW)
