"""WorkerProc without an executor: the handshake by its parts, the tracing span, and what a rank does at its end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from membership.base.errors import RankError
from membership.base.rank_id import RankId
from tests.support.executors import WORKER, config
from tests.support.helpers import eventually
from workers.agent.forkserver_client import ForkServer
from workers.agent.handles import UnreadyWorkerProcHandle, WorkerProcHandle
from workers.ipc.doorbell import Doorbell
from workers.ipc.host_lock import HostLock
from workers.protocol.launch import Launch
from workers.protocol.messages import reader_id
from workers.queue.message_queue import MessageQueue
from workers.worker_proc import WorkerProc

pytestmark = pytest.mark.integration

PRELOAD = [
    "workers.rank.worker_proc",
    "tests.support.small_worker:trace_to_file",
    "tests.support.small_worker:pretend_groups",
]


class Parent:
    """What a parent of ranks has."""

    def __init__(self, stack: ExitStack) -> None:
        self.exits: dict[int, int] = {}
        self.lock = HostLock.create()
        stack.callback(os.close, self.lock)
        self.doorbell = stack.enter_context(Doorbell())
        self.calls = stack.enter_context(MessageQueue("calls"))
        self.forkserver = stack.enter_context(ForkServer(PRELOAD, on_exit=self.ended))

    def ended(self, pid: int, status: int) -> None:
        self.exits[pid] = status

    def make(self, rank: int, faults: str = "") -> UnreadyWorkerProcHandle:
        launch = Launch(RankId(rank, 1), "n", config(faults), WORKER, self.calls.export_handle().encode())
        return WorkerProc.make_worker_process(launch, self.forkserver, self.lock)


@pytest.fixture
def diary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMALL_WORKER_DIARY", str(tmp_path))
    return tmp_path


@pytest.fixture
def parent(diary: Path) -> Iterator[Parent]:
    with ExitStack() as stack:
        yield Parent(stack)


def end(parent: Parent, handle: WorkerProcHandle) -> None:
    pid = handle.child.pid
    handle.close()
    eventually(lambda: parent.exits.get(pid) == 0, 30, "an orderly end")


def test_many_ranks_start_at_once_and_shake_hands_in_a_fixed_order(parent: Parent) -> None:
    unready = [parent.make(rank) for rank in range(3)]
    handles = WorkerProc.wait_for_ready(unready, 30, parent.doorbell)
    assert [handle.key for handle in handles] == [(0, 1), (1, 1), (2, 1)]
    parent.calls.wait_until_ready([reader_id(handle.key) for handle in handles], timeout_s=5)
    assert [handle.exchange_handle for handle in handles] == [b"exchange-%d-1" % rank for rank in range(3)]
    assert all(handle.peer_response_handles == [] for handle in handles)
    beats = handles[0].liveness.heartbeats
    eventually(lambda: handles[0].liveness.heartbeats > beats, 30, "a heartbeat")
    for handle in handles:
        end(parent, handle)


def test_the_first_failure_ends_the_wait_and_names_its_rank(parent: Parent) -> None:
    unready = [parent.make(rank, "fail-at-start-1") for rank in range(2)]
    with pytest.raises(RankError, match=r"rank 1 \(incarnation 1\) could not start"):
        WorkerProc.wait_for_ready(unready, 30, parent.doorbell)
    eventually(lambda: len(parent.exits) == 2, 30, "both ended")


def test_a_rank_traces_its_start_and_destroys_its_parallel_groups(parent: Parent, diary: Path) -> None:
    [handle] = WorkerProc.wait_for_ready([parent.make(4)], 30, parent.doorbell)
    assert (diary / "spans").read_text() == "Worker init\n"
    end(parent, handle)
    assert (diary / "4.1").read_text() == "shutdown"
    assert (diary / "groups").read_text() == "destroyed"


def test_a_rank_logs_as_other_roles_do(capfd: pytest.CaptureFixture[str], diary: Path) -> None:
    with ExitStack() as stack:
        parent = Parent(stack)  # here, so that its ranks inherit the captured stderr
        [handle] = WorkerProc.wait_for_ready([parent.make(3, "fail-on-demand")], 30, parent.doorbell)
        (diary / "fail").touch()
        eventually(lambda: parent.exits.get(handle.child.pid) == 1, 30, "the rank's end")
        handle.close()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    [failed] = [line for line in lines if line["event"] == "rank_failed"]
    assert (failed["role"], failed["rank"], failed["incarnation"]) == ("worker", 3, 1)
    assert failed["pid"] == handle.child.pid
    assert failed["exception"].startswith("Traceback")
    assert "ValueError: this worker fails while it serves" in failed["exception"]
    assert "\u256d" not in failed["exception"], "a frame is drawn around it"
