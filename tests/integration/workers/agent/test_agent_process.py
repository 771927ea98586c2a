"""The agent as a process of its own, with a real etcd: its death, the store's death, a loaded machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from elastic.serve.etcd_server import EtcdServer
from membership.base.rank_id import RankId
from membership.store.etcd import connect
from membership.store.interface import Store
from tests.support.agent_scene import WORKER, Scene
from tests.support.helpers import eventually, hang

pytestmark = pytest.mark.integration

A, B, C = RankId(0, 1), RankId(1, 2), RankId(2, 3)
PROGRAM = f"""
import signal, sys, threading
from pathlib import Path
from membership.store.etcd import connect
from membership.base.events import EventLog
from membership.base.starter import end_with_starter
from workers.agent.agent import AgentOptions, run_agent
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
end_with_starter()
store = connect([sys.argv[1]])
run_agent(store, "c", "n", stop, EventLog(Path(sys.argv[2]), "agent", "c"), AgentOptions("{WORKER}"))
store.close()
if {{"torch", "transformers"}} & sys.modules.keys():
    sys.exit("the agent imported torch or transformers")
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path / "etcd") as made:
        yield made


@pytest.fixture
def store(server: EtcdServer) -> Iterator[Store]:
    made = connect([server.url])
    yield made
    made.close()


@pytest.fixture
def scene(store: Store, tmp_path: Path) -> Scene:
    made = Scene(store, tmp_path / "events.jsonl")
    made.configure(lease_ttl_s=4.0)
    return made


@contextmanager
def agent_process(server: EtcdServer, scene: Scene) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, server.url, str(scene.path)])
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=30)


def test_a_killed_agent_takes_its_ranks_along_and_the_next_one_cleans_up(server: EtcdServer, scene: Scene) -> None:
    with agent_process(server, scene) as first:
        scene.assign(A, B, C)
        state = scene.until_registered(A, B, C)
        pids = [record.pid for record in state.ranks.values()]
        hang(pids[0])
        family = [child.pid for child in psutil.Process(first.pid).children(recursive=True)]
        assert set(pids) < set(family)
        first.kill()
        first.wait(timeout=30)
        eventually(lambda: not any(psutil.pid_exists(pid) for pid in family), 30, f"{family} gone")
    with agent_process(server, scene) as second:
        state = scene.until(lambda s: "n" in s.agents and s.agents["n"].pid == second.pid, "the next agent", 30)
        scene.until(lambda s: not s.ranks, "the earlier agent's records gone")
        assert len(scene.events("rank_spawned")) == 3, "what was assigned to the earlier agent is not run"
        scene.assign((0, 4), (1, 5), (2, 6))
        scene.until_registered((0, 4), (1, 5), (2, 6))
        second.terminate()
        assert second.wait(timeout=30) == 0
    state = scene.state()
    assert (state.agents, state.ranks, state.exits) == ({}, {}, {})


def test_ranks_outlive_a_crash_of_the_store(server: EtcdServer, scene: Scene) -> None:
    with agent_process(server, scene):
        scene.assign(A, B)
        before = scene.until_registered(A, B)
        os.kill(server.pid, signal.SIGKILL)
        os.kill(before.ranks[B].pid, signal.SIGKILL)
        eventually(lambda: scene.events("rank_died"), 30, "the death noticed without the store")
        server.restart()

        def published() -> bool:
            state = scene.state()
            return "n" in state.agents and A in state.ranks and B not in state.ranks and 1 in state.exits

        eventually(published, 30, "what happened meanwhile in the store")
        assert scene.state().ranks[A].pid == before.ranks[A].pid
        assert len(scene.events("rank_died")) == 1


def test_ranks_with_heartbeats_are_not_evicted_from_a_busy_machine(server: EtcdServer, scene: Scene) -> None:
    burn = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # it ends with us
    burners: list[subprocess.Popen[bytes]] = []
    with agent_process(server, scene):
        scene.assign(A, B, C)
        pids = {key: record.pid for key, record in scene.until_registered(A, B, C).ranks.items()}
        try:
            for _ in range(2 * (os.cpu_count() or 1)):
                burners.append(subprocess.Popen([sys.executable, "-c", burn]))
            deadline = time.monotonic() + 5.0
            while time.monotonic() < deadline:
                state = scene.state()
                assert {key: record.pid for key, record in state.ranks.items()} == pids
                assert not state.exits
                time.sleep(0.1)
        finally:
            for burner in burners:
                burner.kill()
                burner.wait(timeout=30)


def test_the_agents_modules_are_light() -> None:
    program = "import sys, workers.agent.agent; print({'torch', 'transformers', 'zmq'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
