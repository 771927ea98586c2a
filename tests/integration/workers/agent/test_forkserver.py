"""The forkserver: forks what it is asked, reports ends, keeps no descriptor, and ends with its owner."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from membership.base.errors import RankError
from tests.support.helpers import eventually
from workers.agent.forkserver_client import FORKSERVER_FD, Child, ForkServer

pytestmark = pytest.mark.integration

HERE = "tests.integration.workers.agent.test_forkserver"


def write_and_leave(payload: bytes, fds: list[int]) -> None:
    """Target: write the payload and the number of threads to the pipe, then exit with 7."""
    os.write(fds[0], payload + b" %d" % len(os.listdir("/proc/self/task")))
    raise SystemExit(7)


def wait_for_end_of_file(payload: bytes, fds: list[int]) -> None:
    """Target: read until every writer of the pipe is gone."""
    os.read(fds[0], 1)


def stop_oneself(payload: bytes, fds: list[int]) -> None:
    """Target: a process that no longer reacts to anything."""
    os.kill(os.getpid(), signal.SIGSTOP)


def forward(payload: bytes, fds: list[int]) -> None:
    """Target: the first forward of a small transformers model."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    model.to_empty(device="cpu")(torch.zeros(1, 4, dtype=torch.long))
    os.write(fds[0], b"%.6f" % time.time())


def note_the_process() -> None:
    """For preload: what is to be made once, and comes along in every fork."""
    global _preloaded_in
    _preloaded_in = os.getpid()


def report_preloading_pid(payload: bytes, fds: list[int]) -> None:
    """Target: write the process id that `note_the_process` has seen."""
    os.write(fds[0], b"%d" % _preloaded_in)


_preloaded_in = 0


class Ends:
    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def __call__(self, pid: int, status: int) -> None:
        self.seen[pid] = status


def test_a_child_runs_its_target_and_its_end_is_reported() -> None:
    ends = Ends()
    read, write = os.pipe()
    with ForkServer(["json"], on_exit=ends) as server:
        child = server.fork(f"{HERE}:write_and_leave", b"hello", [write]).result(timeout=30)
        os.close(write)
        assert os.read(read, 100) == b"hello 1"
        assert os.read(read, 1) == b"", "the server kept a copy of the pipe"
        eventually(lambda: ends.seen.get(child.pid) == 7, 30, "the child's exit status")
        os.close(child.pidfd)
    os.close(read)


def test_siblings_do_not_inherit_each_others_pipes() -> None:
    ends = Ends()
    children: list[Child] = []
    writers = []
    with ForkServer([], on_exit=ends) as server:
        for _ in range(3):
            read, write = os.pipe()
            children.append(server.fork(f"{HERE}:wait_for_end_of_file", b"", [read]).result(timeout=30))
            os.close(read)
            writers.append(write)
        os.close(writers[0])
        eventually(lambda: children[0].pid in ends.seen, 30, "end of file in the first child")
        assert len(ends.seen) == 1
        for write in writers[1:]:
            os.close(write)
        eventually(lambda: len(ends.seen) == 3, 30, "the others' ends")
        for child in children:
            os.close(child.pidfd)


def test_a_killed_child_is_reported_with_its_signal() -> None:
    ends = Ends()
    read, write = os.pipe()
    with ForkServer([], on_exit=ends) as server:
        child = server.fork(f"{HERE}:wait_for_end_of_file", b"", [read]).result(timeout=30)
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        eventually(lambda: ends.seen.get(child.pid) == -signal.SIGKILL, 30, "the signal")
        os.close(child.pidfd)
    os.close(read)
    os.close(write)


def test_a_module_with_threads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        ForkServer(["threaded"], on_exit=Ends()) as server,
        pytest.raises(RankError, match=r"threads \[.*\] after importing threaded"),
    ):
        server.fork(f"{HERE}:write_and_leave", b"", []).result(timeout=30)


def test_a_module_that_is_missing_is_named() -> None:
    with ForkServer(["no_such_module"], on_exit=Ends()) as server, pytest.raises(RankError, match="no_such_module"):
        server.fork(f"{HERE}:write_and_leave", b"", []).result(timeout=30)


def test_a_killed_server_takes_its_children_along_and_fails_requests() -> None:
    read, write = os.pipe()
    with ForkServer([], on_exit=Ends()) as server:
        child = server.fork(f"{HERE}:wait_for_end_of_file", b"", [read]).result(timeout=30)
        assert server.process is not None
        server.process.kill()
        eventually(lambda: not psutil.pid_exists(child.pid), 30, "the child gone with its server")
        eventually(lambda: not server.alive, 30, "the owner to notice")
        with pytest.raises(RankError, match="gone"):
            server.fork(f"{HERE}:wait_for_end_of_file", b"", [read]).result(timeout=30)
        os.close(child.pidfd)
    os.close(read)
    os.close(write)


def test_the_server_and_even_a_stopped_child_end_with_a_killed_owner(tmp_path: Path) -> None:
    program = f"""
import sys, time
from workers.agent.forkserver_client import ForkServer
server = ForkServer([], on_exit=lambda pid, status: None)
child = server.fork("{HERE}:stop_oneself", b"", []).result(timeout=30)
print(server.process.pid, child.pid, flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    eventually(lambda: psutil.Process(pids[1]).status() == psutil.STATUS_STOPPED, 30, "the child to stop")
    owner.kill()
    owner.wait(timeout=30)
    owner.stdout.close()
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30, f"{pids} gone")


def test_a_server_forks_another_one_for_another_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported comes along, and the second one goes on when the first has ended."""
    ends, preload = Ends(), ["torch", f"{HERE}:note_the_process"]
    with ForkServer(preload, on_exit=ends) as first:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            made = first.fork("workers.agent.forkserver:serve_link", b"{}", [theirs.fileno(), 2], outlives=True)
        os.close(made.result(timeout=60).pidfd)
        monkeypatch.setenv(FORKSERVER_FD, str(ours.detach()))
        second = ForkServer(preload, on_exit=ends)
        assert second.process is None
        assert first.process is not None
        assert FORKSERVER_FD not in os.environ, "the next one is started as usual"
    with second:
        read, write = os.pipe()
        child = second.fork(f"{HERE}:report_preloading_pid", b"", [write]).result(timeout=30)
        os.close(write)
        assert int(os.read(read, 100)) == first.process.pid
        os.close(read)
        eventually(lambda: ends.seen.get(child.pid) == 0, 30, "the child's end reported by the second server")
        os.close(child.pidfd)
    eventually(lambda: not psutil.pid_exists(made.result(timeout=0).pid), 30, "the second server gone with its owner")


def test_an_inherited_server_that_is_none_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    monkeypatch.setenv(FORKSERVER_FD, str(ours.detach()))
    with ForkServer([], on_exit=Ends()) as server:
        eventually(lambda: not server.alive, 30, "the owner to notice")


def test_a_child_is_at_its_first_forward_at_once() -> None:
    read, write = os.pipe()
    with ForkServer(
        ["torch", "transformers", "transformers.models.mixtral.modeling_mixtral"], on_exit=Ends()
    ) as server:
        for _ in range(5):
            begun = time.time()
            child = server.fork(f"{HERE}:forward", b"", [write]).result(timeout=120)
            done = float(os.read(read, 100))
            print(f"first forward after {1e3 * (done - begun):.1f} ms")
            os.close(child.pidfd)
    os.close(read)
    os.close(write)
