"""Executor and rank processes: calls, failures, deaths, ends. Real processes, real signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from membership.base.errors import RankDied, RankError, RankFailed, WaitTimeout
from membership.base.rank_id import RankId
from membership.planning.identity import KERNELS
from tests.support.executors import executor, launch
from tests.support.helpers import eventually, hang
from workers.agent.executor import Death, MultiprocExecutor
from workers.agent.forkserver_client import Child
from workers.agent.handles import UnreadyWorkerProcHandle
from workers.ipc.handover import HandoverRefused
from workers.protocol.identity import Identity
from workers.protocol.pool_client import opened

pytestmark = pytest.mark.integration


@pytest.fixture
def three() -> Iterator[MultiprocExecutor]:
    made = executor()
    launch(made, [RankId(0, 1), RankId(1, 2), RankId(2, 3)], 30)
    yield made
    made.shutdown()


def pid_of(made: MultiprocExecutor, rank: int) -> int:
    return next(worker.child.pid for key, worker in made.workers.items() if key.rank == rank)


# --- calls


def test_a_call_runs_on_every_rank_and_answers_in_rank_order(three: MultiprocExecutor) -> None:
    assert three.collective_rpc("echo", 30, ("x",)) == [(0, "x"), (1, "x"), (2, "x")]
    assert three.collective_rpc("echo", 30, kwargs={"value": 5}, output_rank=1) == [(1, 5)]
    assert three.collective_rpc("echo", 30, ("y",), ranks=[2]) == [(2, "y")]
    assert three.collective_rpc(lambda worker, n: worker.ctx.rank * n, 30, (10,)) == [0, 10, 20]


def test_an_error_of_a_rank_that_was_not_to_reply_is_raised_at_once(three: MultiprocExecutor) -> None:
    with pytest.raises(RankFailed, match=r"rank 2 .*fail: ValueError: rank 2 was asked to fail") as caught:
        three.collective_rpc("fail", 30, (2,), output_rank=0)
    assert any("Traceback" in note and "in fail" in note for note in caught.value.__notes__)
    assert three.collective_rpc("echo", 30, (1,)) == [(0, 1), (1, 1), (2, 1)]


def test_a_late_reply_is_not_taken_for_the_next_one(three: MultiprocExecutor) -> None:
    with pytest.raises(WaitTimeout, match=r"sleep: no answer within 0.2 s from rank 0"):
        three.collective_rpc("sleep", 0.2, (0.6,))
    assert three.collective_rpc("echo", 30, ("next",)) == [(0, "next"), (1, "next"), (2, "next")]


def test_an_output_that_is_still_being_made_does_not_hold_up_the_rank(three: MultiprocExecutor, tmp_path: Path) -> None:
    slow = three.submit("once_there_is", (str(tmp_path / "now"),), timeout_s=60)
    assert three.collective_rpc("echo", 30, (1,)) == [(0, 1), (1, 1), (2, 1)]
    assert not slow.future.done()
    (tmp_path / "now").touch()
    assert set(slow.future.result(timeout=60).values()) == {"there"}
    with pytest.raises((RankFailed, WaitTimeout)):
        three.collective_rpc("later", 0.3, (5.0,))


def test_a_result_that_cannot_travel_is_a_failure_not_silence(three: MultiprocExecutor) -> None:
    with pytest.raises(RankFailed, match="pickle"):
        three.collective_rpc("unpicklable", 30)
    with pytest.raises(RankFailed, match="no_such_method"):
        three.collective_rpc("no_such_method", 30)
    with pytest.raises(RankError, match="cannot be sent"):
        three.collective_rpc("echo", 30, (threading.Lock(),))


def test_ranks_join_at_run_time(three: MultiprocExecutor) -> None:
    launch(three, [RankId(3, 4)], 30)
    assert three.collective_rpc("echo", 30, ("x",)) == [(n, "x") for n in range(4)]


# --- deaths


def test_a_killed_rank_leaves_its_pool_and_one_that_lives_does_not_show_it(three: MultiprocExecutor) -> None:
    """Also once it is forgotten, until it is freed. A rank that is stopped lives."""
    dead, alive = RankId(1, 2), RankId(2, 3)
    three.collective_rpc(write_into_pool, 30, (b"computed",))
    hang(pid_of(three, 2))
    with pytest.raises(HandoverRefused, match="may still write"):
        pool_of(three, alive)
    os.kill(pid_of(three, 1), signal.SIGKILL)
    assert three.workers[dead].ended(30.0)
    assert pool_of(three, dead) == b"computed"
    asked = three.workers[dead]
    three.forget(dead)
    eventually(lambda: three.left_pools() == {dead}, 30, "the rank to be forgotten")
    asked.close()  # if it is not yet
    assert asked.writes_no_more(), "a reader's question may find the rank before it is forgotten, and look at it after"
    assert pool_of(three, dead) == b"computed"
    three.free_pool(dead)
    with pytest.raises(HandoverRefused, match="not kept"):
        pool_of(three, dead)
    os.kill(pid_of(three, 2), signal.SIGCONT)
    three.forget(alive)  # as if it would not end
    eventually(lambda: alive not in three.workers, 30, "the rank to be forgotten")
    with pytest.raises(HandoverRefused, match="not kept"):
        pool_of(three, alive)


def write_into_pool(worker: Any, data: bytes) -> None:
    os.pwrite(worker.ctx.pool_fd, data, 0)


def pool_of(made: MultiprocExecutor, key: RankId) -> bytes:
    with opened(made.pools.handle(), key) as pool:
        return os.pread(pool.fd, 100, 0)


def test_a_killed_rank_fails_its_calls_and_the_others_stay(three: MultiprocExecutor) -> None:
    deaths: list[Death] = []
    exits: dict[int, int] = {}
    three.register_failure_callback(deaths.append)
    three.register_exit_callback(lambda pid, status: exits.update({pid: status}))
    pid = pid_of(three, 1)
    to_all = three.submit("sleep", (1.0,), timeout_s=30)
    others = three.submit("echo", (7,), keys=[RankId(0, 1), RankId(2, 3)], timeout_s=30)
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankDied, match=r"rank 1 \(incarnation 2\) died during sleep"):
        to_all.future.result(timeout=30)
    print(f"call failed {1e3 * (time.monotonic() - begun):.2f} ms after the kill")
    assert others.future.result(timeout=30) == {(0, 1): (0, 7), (2, 3): (2, 7)}
    eventually(lambda: exits.get(pid) == -signal.SIGKILL, 30, "the exit status")
    assert [(death.key, death.detected_by) for death in deaths] == [((1, 2), "robust futex")]
    with pytest.raises(RankDied):
        three.collective_rpc("echo", 30, (1,), ranks=[1])
    three.forget(RankId(1, 2))
    eventually(lambda: len(three.workers) == 2, 30, "the dead rank forgotten")
    assert three.collective_rpc("echo", 30, (1,)) == [(0, 1), (2, 1)]


def test_a_dead_rank_does_not_stall_the_queue(three: MultiprocExecutor) -> None:
    os.kill(pid_of(three, 2), signal.SIGKILL)
    for _ in range(40):
        assert three.submit("echo", (1,), keys=[RankId(0, 1)], timeout_s=30).future.result(timeout=30)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_is_buried_whatever_becomes_of_its_notice(
    three: MultiprocExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[Death] = []
    three.register_failure_callback(deaths.append)
    monkeypatch.setattr(three._notices, "tell", Mock(side_effect=ValueError("a fault of ours")))
    os.kill(pid_of(three, 1), signal.SIGKILL)
    eventually(lambda: [death.key for death in deaths] == [RankId(1, 2)], 30, "its death")


def test_a_forkserver_that_died_takes_its_ranks_along_and_is_replaced(three: MultiprocExecutor) -> None:
    deaths: list[Death] = []
    three.register_failure_callback(deaths.append)
    assert three._forkserver.process is not None
    three._forkserver.process.kill()
    eventually(lambda: len(deaths) == 3, 30, "all deaths")
    eventually(lambda: not three._forkserver.alive, 30, "the forkserver's end noticed")
    launch(three, [RankId(0, 9)], 30)
    assert three.submit("echo", (1,), keys=[RankId(0, 9)], timeout_s=30).future.result(timeout=30) == {(0, 9): (0, 1)}


# --- starting


def test_a_rank_that_cannot_start_is_named_with_its_traceback_and_others_start() -> None:
    made = executor("fail-at-start-1")
    try:
        with pytest.raises(RankError, match=r"rank 1 \(incarnation 2\) could not start: ValueError: this worker fails"):
            launch(made, [RankId(0, 1), RankId(1, 2)], 30)
        assert made.collective_rpc("echo", 30, (1,)) == [(0, 1)]
    finally:
        made.shutdown()


def test_waiting_for_a_rank_that_hangs_has_a_deadline_that_names_it() -> None:
    made = executor("hang-at-start")
    try:
        with pytest.raises(WaitTimeout, match=r"rank 4 \(incarnation 1\) was not ready within 1 s"):
            launch(made, [RankId(4, 1)], 1)
    finally:
        made.shutdown()


@pytest.mark.parametrize("scale_up", [True, False])
def test_an_elastic_launch_leaves_device_and_model_for_later(scale_up: bool) -> None:
    made = executor(scale_up=scale_up)
    try:
        launch(made, [RankId(0, 1)], 30)
        assert made.collective_rpc("all_calls", 30) == [[] if scale_up else ["init_device", "load_model"]]
        for _ in range(2):
            assert made.collective_rpc("initialise", 30) == [Identity({KERNELS: "small"})]
        assert made.collective_rpc("all_calls", 30) == [["init_device", "load_model"]]
    finally:
        made.shutdown()


# --- surroundings


def test_title_environment_and_no_torch(three: MultiprocExecutor) -> None:
    command = " ".join(psutil.Process(pid_of(three, 2)).cmdline())
    assert "elastic-ep::Worker_DP2_EP2" in command

    def change(worker: Any) -> tuple[bool, str | None, bool]:
        import os
        import sys

        os.environ["SMALL_WORKER_LATER"] = "1"
        return ("torch" in sys.modules, worker.ctx.environ.get("SMALL_WORKER_LATER"), "OMP_NUM_THREADS" in os.environ)

    assert three.collective_rpc(change, 30) == [(False, None, True)] * 3


def test_lines_of_a_rank_carry_its_name() -> None:
    program = """
import sys
from membership.base.rank_id import RankId
from tests.support.executors import executor, launch
made = executor()
launch(made, [RankId(3, 1)], 30)
made.collective_rpc(lambda worker: print("hello from a rank", flush=True), 10)
made.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert re.search(r"^\(Worker_DP3_EP3 pid=\d+\) hello from a rank$", done.stdout, re.M), done.stdout + done.stderr


def test_the_host_lock_is_exclusive_and_freed_by_death(three: MultiprocExecutor) -> None:
    def hold(worker: Any, seconds: float) -> tuple[float, float]:
        import time

        with worker.ctx.host_lock:
            begun = time.monotonic()
            time.sleep(seconds)
            return begun, time.monotonic()

    spans = sorted(three.collective_rpc(hold, 30, (0.1,)))
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(spans))
    holder = three.submit(hold, (60.0,), keys=[RankId(0, 1)], timeout_s=30)
    os.kill(pid_of(three, 0), signal.SIGKILL)
    with pytest.raises(RankDied):
        holder.future.result(timeout=30)
    assert three.submit(hold, (0.0,), keys=[RankId(1, 2)], timeout_s=30).future.result(timeout=30)


# --- ends


def test_sigterm_ends_a_rank_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_WORKER_DIARY", str(tmp_path))
    made = executor()
    try:
        exits: dict[int, int] = {}
        made.register_exit_callback(lambda pid, status: exits.update({pid: status}))
        launch(made, [RankId(0, 1)], 30)
        pid = pid_of(made, 0)
        os.kill(pid, signal.SIGTERM)
        with suppress(ProcessLookupError):  # it may have ended by now
            os.kill(pid, signal.SIGTERM)
        eventually(lambda: exits.get(pid) == 128 + signal.SIGTERM, 30, f"an orderly exit, not {exits}")
        assert (tmp_path / "0.1").read_text() == "shutdown"
    finally:
        made.shutdown()


def test_a_closed_death_pipe_ends_one_rank_orderly_and_no_sibling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALL_WORKER_DIARY", str(tmp_path))
    made = executor()
    try:
        launch(made, [RankId(0, 1), RankId(1, 2)], 30)
        assert made._forkserver.process is not None
        for worker in made.workers.values():
            ours = os.readlink(f"/proc/self/fd/{worker.death_writer}")
            for child in psutil.Process(made._forkserver.process.pid).children():
                flags = flags_of(child.pid, ours)
                assert bool(flags) == (child.pid == worker.child.pid), "only the rank itself reads its death pipe"
                assert all(re.search(r"flags:\s+0\d*0$", text, re.M) for text in flags), "a hidden write end"
        ended = made.workers[RankId(0, 1)]
        ended.close_death_pipe()
        eventually(lambda: ended.ended(), 30, "the rank to end")
        assert (tmp_path / "0.1").read_text() == "shutdown"
        assert made.submit("echo", (1,), keys=[RankId(1, 2)], timeout_s=30).future.result(timeout=30) == {
            (1, 2): (1, 1)
        }
    finally:
        made.shutdown()


def flags_of(pid: int, target: str) -> list[str]:
    """What /proc says of each descriptor of this target. Others may be closed meanwhile."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/{pid}/fd/{fd}") == target:
                found.append(Path(f"/proc/{pid}/fdinfo/{fd}").read_text())
    return found


def test_a_rank_that_died_before_it_was_retired_is_reported_as_a_death(three: MultiprocExecutor) -> None:
    deaths: list[Death] = []
    ended: list[RankId] = []
    three.register_failure_callback(deaths.append)
    held, go_on = threading.Event(), threading.Event()

    def hold_up() -> None:
        held.set()
        go_on.wait(timeout=30)

    three._post(hold_up)  # the thread that would notice the death first
    assert held.wait(timeout=30)
    worker = three.workers[RankId(1, 2)]
    os.kill(worker.child.pid, signal.SIGKILL)
    eventually(worker.has_died, 30, "the kernel to say so")
    three.retire([RankId(1, 2)], ended.append)
    go_on.set()
    eventually(lambda: [death.key for death in deaths] == [(1, 2)], 30, "the death to be reported")
    three.retire([RankId(2, 3)], ended.append)
    eventually(lambda: ended == [(2, 3)], 30, "the living one to end")
    assert len(deaths) == 1, "one that was asked to go has not died"


def test_the_ladder_ends_even_a_rank_that_ignores_everything(three: MultiprocExecutor) -> None:
    hang(pid_of(three, 1))
    ended: list[RankId] = []
    three.retire([RankId(1, 2)], ended.append)
    eventually(lambda: ended == [(1, 2)], 30, "the stopped rank to be killed")
    assert three.collective_rpc("echo", 30, (1,)) == [(0, 1), (2, 1)]


def test_ranks_end_with_a_killed_parent_even_a_stopped_one() -> None:
    program = """
import os, signal, time
from membership.base.rank_id import RankId
from tests.support.executors import executor, launch
made = executor()
launch(made, [RankId(0, 1), RankId(1, 2)], 30)
pids = [worker.child.pid for worker in made.workers.values()]
os.kill(pids[0], signal.SIGSTOP)
print(made._forkserver.process.pid, *pids, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait(timeout=30)
    parent.stdout.close()
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30, f"{pids} gone")


def test_a_rank_is_ended_though_no_thread_could_wait_for_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made = executor()
    launch(made, [RankId(0, 1)], 30)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        made.start([RankId(1, 2)], 30, lambda key, outcome: pytest.fail(f"{key}: {outcome}"))
        made.shutdown()  # what it leaves behind, if anything, is seen after the test


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_rank_is_given_up_while_another_thread_closes_it() -> None:
    """Whichever is first: its descriptors are closed once, and no signal goes to a descriptor of somebody else."""
    waited, go_on = threading.Event(), threading.Event()

    class Slow(Future[Child]):
        def result(self, timeout: float | None = None) -> Child:
            waited.set()
            assert go_on.wait(30)
            return super().result(timeout)

    process = subprocess.Popen(["sleep", "60"])
    forked, (reader, writer), (death_reader, death) = Slow(), os.pipe(), os.pipe()
    os.close(writer)
    os.close(death_reader)
    forked.set_result(Child(process.pid, os.pidfd_open(process.pid)))
    handle = UnreadyWorkerProcHandle(RankId(0, 1), death, forked, reader)
    with ThreadPoolExecutor(2) as threads:
        closed = threads.submit(handle.close)
        assert waited.wait(30)
        abandoned = threads.submit(handle.abandon)
        eventually(lambda: abandoned.running() or abandoned.done(), 30, "the second thread to run")
        go_on.set()
        closed.result(timeout=30)
        abandoned.result(timeout=30)
    assert process.wait(timeout=30) == -signal.SIGKILL
