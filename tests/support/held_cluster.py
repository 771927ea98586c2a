"""A served cluster whose roles wait at failpoints while a test injects a fault: each point has a gate, a file.

Shared by many cases: streams run all the time, and every case holds what ended in it against the fault-free run.
A second controller stands by, so that a case need not wait for the supervisor's delay before it starts one again.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.target.warm_start import WarmProcess, WarmStart
from chaos.workload.history import compare
from chaos.workload.streams import Load, Workload
from elastic.cli.client import wait_for
from elastic.serve.role_process import revoke_leases
from membership.base.events import Tail
from membership.base.failpoints import ENV, KIND
from membership.operations.change import Change
from membership.store import codec
from membership.store.keys import Keys
from membership.store.records import ClusterState, LeaderRecord, Operation, RankRecord
from tests.support.helpers import eventually, stopped
from tests.support.served import another, role_pid

T = 60.0
DEADLINE_S = 30.0  # of an operation
FLAGS = ("--restart-intensity", "1000", "--restart-window", "1s", "--max-ranks", "4")  # slots die often, on purpose
STREAMS = 3
LAST_LOOK_S = 20.0  # on a busy machine


class HeldCluster:
    """Owns the cluster, the standby controller and the streams. A context manager."""

    def __init__(self, model: Path, ranks: int, folder: Path, points: Iterable[str], warm: WarmStart) -> None:
        self.ranks = ranks
        self._gates = {point: folder / point for point in points}
        for gate in self._gates.values():
            gate.touch()
        faults = ";".join(f"{point}=wait:{gate}" for point, gate in self._gates.items())
        self._environ = {ENV: faults}
        self.cluster = ServedCluster(
            model, ranks, state_dir=folder / "state", flags=FLAGS, environ=self._environ, warm=warm
        )
        self._opened = ExitStack()
        self._standby: WarmProcess | None = None
        self._standing_by = ExitStack()
        self._checked = 0
        self.broken = ""  # the case that left it in a state which no other can start from

    def __enter__(self) -> HeldCluster:
        with ExitStack() as opened:
            cluster = opened.enter_context(self.cluster)
            cluster.wait_serving(self.ranks)
            self._store = cluster.state.address().connect()
            opened.callback(self._store.close)
            self._keys = Keys(cluster.state.address().cluster)
            opened.callback(self._end_standby)
            self._stand_by()
            self._tail = Tail(cluster.state.events)
            self._oracle = {record.prompt: record for record in self._streams().run_once()}
            self.workload = self._streams()
            self.workload.start()
            opened.callback(self.workload.stop)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened.close()

    def _streams(self) -> Workload:
        model = self.cluster.model_name()
        return Workload(self.cluster.url, model, Load(prompts=8, streams=STREAMS, max_tokens=32))

    @property
    def state(self) -> ClusterState:
        """What the store says."""
        return self.cluster.client().state()

    # --- faults

    @contextmanager
    def held(self, point: str) -> Iterator[None]:
        """A process that reaches `point` waits there until the block is left."""
        while self._tail.read() is not None:
            continue
        self._gates[point].unlink()
        try:
            yield
        finally:
            self._gates[point].touch()

    def wait_held(self, point: str) -> None:
        """Until a process waits there: the history says so."""

        def there() -> bool:
            return any(e.kind == KIND and e.fields["name"] == point.partition("@")[0] for e in self._tail.read() or ())

        eventually(there, T, f"a process to wait at {point}")

    @property
    def leader(self) -> LeaderRecord:
        """The controller that leads."""
        item = eventually(lambda: self._store.get(self._keys.leader), T, "a controller to lead")
        return codec.decode(item.value, LeaderRecord)

    def depose_controller(self) -> None:
        """Another one leads, and the one that did does not know."""
        deposed = self.leader
        revoke_leases(self._store, self._keys.prefix, deposed.pid, deposed.node)
        eventually(lambda: self.leader.pid != deposed.pid, T, "another controller to lead")

    def kill_controller(self) -> None:
        """The one that leads; its leases end at once, as its supervisor sees to."""
        leader = self.leader
        kill(leader.pid)
        revoke_leases(self._store, self._keys.prefix, leader.pid, leader.node)
        if self._standby is not None and leader.pid == self._standby.pid:
            self._end_standby()
            self._stand_by()

    def _stand_by(self) -> None:
        self._standby = self._standing_by.enter_context(another(self.cluster, "controller", environ=self._environ))

    def _end_standby(self) -> None:
        if self._standby is not None:
            self._standby.send_signal(signal.SIGTERM)
            self._standby.wait(T)
            self._standing_by.close()

    def process_of(self, rank: int) -> RankRecord:
        """The latest process in a slot."""

        def found() -> RankRecord | None:
            known = [record for (slot, _), record in sorted(self.state.ranks.items()) if slot == rank]
            return known[-1] if known and known[-1].pid else None

        return eventually(found, T, f"rank {rank} to have a process")

    def stop_etcd(self, seconds: float, point: str) -> None:
        """etcd answers no client for `seconds`; what waits at `point` goes on meanwhile."""
        with stopped(role_pid(self.cluster, "etcd")):
            self._gates[point].touch()
            until = time.monotonic() + seconds
            eventually(lambda: time.monotonic() > until, T, "the outage to have lasted")

    # --- what must hold

    def propose(self, change: Change, timeout_s: float) -> Operation:
        """Ask for it."""
        return self.cluster.client().propose(change, op_id=None, if_epoch=None, timeout_s=timeout_s)

    def end_of(self, operation: Operation) -> Operation:
        """The operation once it has ended: within its deadline, save for the time that the last look takes."""
        *_, operation = wait_for(self.cluster.client(), operation, 2 * DEADLINE_S, threading.Event())
        assert operation.finished <= operation.deadline + LAST_LOOK_S, operation
        return operation

    def check_streams(self) -> None:
        """All that streams at this moment ends, and all that has ended since the last time is as without a fault."""
        open_now = len(self.workload.records()) + STREAMS
        eventually(lambda: len(self.workload.records()) >= open_now, T, "streams to end")
        records = self.workload.records()
        verdict = compare(records[self._checked :], self._oracle)
        self._checked = len(records)
        assert verdict.ok, verdict.differences
