"""Another user of the host neither reads, writes, stops nor impersonates anything, also while roles die and return.

Needs root, to become another user. What may be reached is the API's port, and the admin port for its token.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.workload.history import compare
from chaos.workload.streams import Workload
from membership.base.run_dir import run_dir
from tests.e2e.conftest import Serve
from tests.support import stranger
from tests.support.helpers import eventually
from tests.support.served import STEADY, fault_free, role_pid

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]

UID = 4321
RANKS = 2
ROLES = ("controller", "engine", "agent", "etcd")


class Watched:
    """The stranger, as the test runs it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def attack(self, inodes: set[str], **known: Any) -> None:
        """Have it try everything once, with what it must know of a cluster; it goes on with that by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"inodes": sorted(inodes), **known}) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "tried\n"

    def report(self) -> dict[str, Any]:
        """All of what it saw, tried and managed; it ends."""
        out, _ = self._process.communicate(timeout=60)
        return dict(json.loads(out))


@contextmanager
def watching() -> Iterator[Watched]:
    """Another user of this host, until the block ends."""
    command = [sys.executable, "-S", stranger.__file__, str(UID)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Watched(process)
        finally:
            process.kill()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter, as /var/lib is, so that nothing protects a cluster in it but itself."""
    with tempfile.TemporaryDirectory(prefix="elastic-ep-strangers-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def inode(sock: socket.socket) -> str:
    return str(os.fstat(sock.fileno()).st_ino)


def test_the_stranger_finds_whatever_is_open(place: Path) -> None:
    """What the other test relies on: each kind of open listener is found, reached, and taken once it is free."""
    path, name = place / "open.sock", f"\0open-{os.getpid()}"
    (place / "secret").touch(mode=0o644)
    with watching() as watched:
        with socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_UNIX) as abstract, socket.socket() as tcp:
            for sock, address in ((unix, str(path)), (abstract, name), (tcp, ("127.0.0.1", 0))):
                sock.bind(address)
                sock.listen(128)
            path.chmod(0o777)
            port = tcp.getsockname()[1]
            watched.attack(
                {inode(unix), inode(abstract), inode(tcp)}, files=[str(place / "secret")], pids=[os.getpid()]
            )
        watched.attack(set())
        report = watched.report()
    managed = set(report["managed"])
    assert {f"reach {path}", f"reach abstract {name[1:]}", f"reach port {port}", f"look {place}"} <= managed
    assert {f"take abstract {name[1:]}", f"take port {port}", f"open {place / 'secret'}"} <= managed
    assert f"take {path}" not in managed, "it may not write there"
    assert not any(what.startswith(("signal", "read")) for what in managed)


def processes(cluster: ServedCluster) -> list[psutil.Process]:
    supervisor = psutil.Process(cluster.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def sockets(cluster: ServedCluster) -> set[str]:
    """Inodes of all sockets that the cluster's processes have."""
    found = set()
    for process in processes(cluster):
        try:
            links = [os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue  # it has just ended
        found |= {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    return found


def attack(watched: Watched, cluster: ServedCluster) -> None:
    state = cluster.state
    files = [state.path, state.path / "cluster.json", state.events, state.log("gateway"), state.path / "etcd"]
    watched.attack(
        sockets(cluster), pids=[process.pid for process in processes(cluster)], files=[str(file) for file in files],
        open=[cluster.port, cluster.admin_port], admin=cluster.admin_port, run=str(run_dir(state.path)),
    )  # fmt: skip


def new_pid(find: Callable[[], int], old: int) -> bool:
    try:
        return find() != old
    except AssertionError:
        return False  # none at the moment


def die_and_return(watched: Watched, cluster: ServedCluster, role: str) -> None:
    """What it had is attacked while it is gone, what it has when it is back."""
    before = role_pid(cluster, role)
    kill(before)
    attack(watched, cluster)
    eventually(lambda: new_pid(lambda: role_pid(cluster, role), before), 60.0, f"another {role}")
    cluster.wait_serving(RANKS)
    attack(watched, cluster)


def a_rank_beside(cluster: ServedCluster, pids: set[int]) -> int:
    """Process of a rank that serves and is none of these; 0: none. Those of an agent that died may still be listed."""
    serving = (rank["pid"] for rank in cluster.status()["ranks"] if rank["state"] == "serving")
    return next((int(pid) for pid in serving if pid not in pids), 0)


def test_another_user_gets_nowhere(place: Path, serve: Serve, demo_model: Path) -> None:
    """`place` comes first, so that it goes last: the cluster in it is still there until then."""
    cluster = serve(demo_model, RANKS, state_dir=place / "state", own_zygote=True)
    cluster.wait_serving(RANKS)
    token, ports = cluster.state.address().admin_token, (cluster.port, cluster.admin_port)
    first = {rank["pid"] for rank in cluster.status()["ranks"]}
    oracle = fault_free(cluster)
    workload = Workload(cluster.url, cluster.model_name(), STEADY)
    with watching() as watched:
        attack(watched, cluster)
        die_and_return(watched, cluster, "gateway")  # which its streams do not survive
        workload.start()
        try:
            for role in ROLES:
                die_and_return(watched, cluster, role)
            kill(eventually(lambda: a_rank_beside(cluster, first), 60.0, "a rank of the agent that came last"))
            attack(watched, cluster)
            cluster.wait_serving(RANKS)
            attack(watched, cluster)
        finally:
            history = workload.stop()
        report = watched.report()
    assert report["managed"] == []
    run = f"unix {place / 'state' / 'run'}/"
    listeners = {name.removeprefix(run).split("-")[0] for name in report["names"]}
    assert listeners == {"handover", "engine", "etcd.sock:0", "etcd"} | {f"tcp {port}" for port in ports}
    each = ("reach", "take", "remove", "move", "signal", "read", "control", "list")
    assert min(report["tried"][what] for what in each) > 50, report["tried"]
    assert report["seen"]
    assert not any(token in command for command in report["seen"])
    verdict = compare(history, oracle)
    assert verdict.ok, verdict.differences
