"""The loops that must outlive faults, the calls of each that can fail, and how to make it need them.

`LOOPS` is the table. A scene runs the loop for real, in its own thread: `provoke` makes it need its calls, `done` says
whether what was provoked last has come about, `untouched` whether what it looks after is as it was.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import zmq

from elastic.engine.gateway_server import EngineServer
from elastic.engine.status_writer import StatusWriter
from elastic.gateway.registration import Registration
from elastic.protocol import Hello, ToGateway, Welcome
from elastic.serve import role_process
from elastic.serve.role_process import RoleProcess
from elastic.serve.roles import Roles
from elastic.serve.store_guard import StoreGuard
from membership.base.attempts import Attempts
from membership.base.errors import QueueClosed
from membership.base.events import EventLog
from membership.base.rank_id import RankId
from membership.planning.controller import run_controller
from membership.store.codec import encode
from membership.store.in_memory import MemoryStore
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from membership.store.records import AgentRecord, ClusterConfig, Desired, EngineStatus, GatewayRecord
from tests.support.agent_scene import Scene as AgentScene
from tests.support.agent_scene import agent
from tests.support.helpers import eventually, running
from workers.agent import worker_proc
from workers.agent.forkserver_client import ForkServer
from workers.agent.registrar import Registrar
from workers.ipc import handover
from workers.ipc.handover import Grant, Handover
from workers.protocol import liveness
from workers.queue.remote_wire import SocketThread

KEYS = Keys("c")
T = 30.0
Call = tuple[Any, str]  # an object, and its attribute that is the call


@dataclass(frozen=True)
class Scene:
    """A loop that runs."""

    provoke: Callable[[], object]
    done: Callable[[], object]
    calls: tuple[Call, ...] = ()  # those that exist only once it runs
    untouched: Callable[[], object] = lambda: True


@dataclass(frozen=True)
class Loop:
    """One line of the table. `calls`: names, for the test's own name; where each is patched is in the scene."""

    file: str
    calls: tuple[str, ...]
    scene: Callable[[Path], AbstractContextManager[Scene]]


def _running(turn: Callable[[], object]) -> tuple[threading.Thread, threading.Event]:
    """The loop in a thread of its own, as its process runs it."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            turn()

    thread = threading.Thread(target=run, name="loop")
    thread.start()
    return thread, stop


@contextmanager
def supervisor(folder: Path) -> Iterator[Scene]:
    """Two role processes; one is killed, the other must not notice."""
    entry, role_process.ENTRY = role_process.ENTRY, "tests.support.idle_role"
    started: list[str] = []
    strangers = set(psutil.Process().children())  # what other tests share
    ignore = lambda *_: None  # noqa: E731
    roles = Roles(
        Attempts("supervisor"), on_start=ignore, on_started=lambda role: started.append(role.name), on_died=ignore
    )
    killed, other = (
        RoleProcess(name, [name], folder / "logs" / f"{name}.log", stable_s=0.0) for name in ("killed", "other")
    )
    roles.add(killed)
    roles.add(other)
    thread, stop = _running(lambda: roles.turn(0.01))
    try:
        eventually(lambda: killed.process and other.process, T, "both roles to run")
        before, victims = other.process, list[int]()

        def provoke() -> None:
            process = eventually(lambda: killed.process, T, "the role to run")
            victims.append(process.pid)
            process.kill()

        def done() -> bool:
            return killed.process is not None and killed.process.pid != victims[-1] and only_two()

        def only_two() -> bool:
            children = set(psutil.Process().children()) - strangers
            return sum(running(child) for child in children) == 2

        calls: tuple[Call, ...] = (
            (subprocess, "_fork_exec"), (os, "pidfd_open"), (subprocess.os, "read"), (Path, "open"),
        )  # fmt: skip
        yield Scene(provoke, done, calls, lambda: other.process is before and thread.is_alive())
    finally:
        stop.set()
        thread.join(T)
        roles.stop((), {}, threading.Event())
        role_process.ENTRY = entry


def wait_for_end_of_file(payload: bytes, fds: list[int]) -> None:
    """Target: read until every writer of the pipe is gone."""
    os.read(fds[0], 1)


@contextmanager
def forkserver(folder: Path) -> Iterator[Scene]:
    """A forkserver whose own calls fail as the file `fault` says; a child of it, which must live on."""
    fault = folder / "fault"
    with ForkServer([f'tests.support.loops:fail_as_told:["{fault}"]'], on_exit=lambda pid, status: None) as server:
        read, write = os.pipe()
        ask = lambda: server.fork("tests.support.loops:wait_for_end_of_file", b"", [read])  # noqa: E731
        first = ask().result(timeout=T)
        children = [first]
        refused: list[str] = []

        def provoke() -> None:
            answer = ask()
            error = answer.exception(timeout=T)
            if error is None:
                children.append(answer.result(timeout=T))
            else:
                refused.append(str(error))

        def done() -> bool:
            before = len(children)
            provoke()
            return len(children) > before

        try:
            yield Scene(provoke, done, ((fault, "fork"), (fault, "pidfd_open")), lambda: psutil.pid_exists(first.pid))
        finally:
            os.close(write)
            os.close(read)
            for child in children:
                os.close(child.pidfd)


def fail_as_told(fault: str) -> None:
    """For preload: from now on the call that the file names fails with the error number that it names."""

    def failing(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            told = Path(fault).read_text().split() if Path(fault).exists() else ["", "0"]
            if told[0] == name:
                Path(fault).with_suffix(".met").write_text(" ".join(told))
                raise OSError(int(told[1]), os.strerror(int(told[1])))
            return real(*args)

        return call

    for name in ("fork", "pidfd_open"):
        setattr(os, name, failing(name))


@contextmanager
def agent_of_ranks(folder: Path) -> Iterator[Scene]:
    """An agent with one rank, which must live on, and another one that it is to start."""
    store = MemoryStore()
    scene = AgentScene(store, folder / "events.jsonl")
    scene.configure()
    first, asked = RankId(0, 1), [1]
    try:
        with agent(scene) as thread:
            scene.assign(first)
            pid = scene.until_registered(first).ranks[first].pid

            def provoke() -> None:
                asked[0] += 1
                scene.assign(first, RankId(1, asked[0]))

            def done() -> bool:
                """Its record without a handle says only that a process was asked for. One that could not join is given
                up with its reason, and the controller asks for the next one: here, we do."""
                state = scene.state()
                if (exit_record := state.exits.get(1)) is not None and exit_record.incarnation == asked[0]:
                    provoke()
                record = state.ranks.get(RankId(1, asked[0]))
                return record is not None and bool(record.exchange_handle)

            calls = (
                (worker_proc.os, "pipe"), (liveness.os, "pidfd_open"), (socket, "send_fds"), (socket, "recv_fds"),
                (threading.Thread, "start"),
            )  # fmt: skip
            yield Scene(provoke, done, calls, lambda: psutil.pid_exists(pid) and thread.is_alive())
    finally:
        store.close()


@contextmanager
def registrar(folder: Path) -> Iterator[Scene]:
    """One record, which changes."""
    store, wanted = MemoryStore(), [1.0]
    made = Registrar(store, KEYS, 3.0)

    def provoke() -> None:
        wanted[0] += 1.0
        record = AgentRecord(node="n", pid=1, started=wanted[0], capacity=1)
        made.publish(KEYS.agent("n"), record)

    def done() -> bool:
        found = store.get(KEYS.agent("n"))
        return found is not None and b"%d" % wanted[0] in found.value and made.settled

    try:
        yield Scene(provoke, done, ((store, "txn"),))
    finally:
        made.close()
        store.close()


@contextmanager
def lease(folder: Path) -> Iterator[Scene]:
    """A lease of a short time to live, which is kept."""
    store = MemoryStore()
    with LeaseKeeper(store, 0.6, persistent=True) as keeper:
        yield Scene(lambda: None, lambda: keeper.alive and keeper.remaining_s > 0.3, ((store, "keepalive"),))
    store.close()


@contextmanager
def mirror(folder: Path) -> Iterator[Scene]:
    """A mirror whose watch breaks; then something changes."""
    store, wanted = MemoryStore(), [0]
    with Mirror(store, "c", probe_every_s=0.01) as made:

        def provoke() -> None:
            wanted[0] += 1
            store.put(KEYS.desired, encode(Desired(ranks=wanted[0])))
            if made._watch is not None:
                made._watch.close()

        def done() -> bool:
            desired = made.state().desired
            return desired is not None and desired.ranks == wanted[0] and made.synced

        yield Scene(provoke, done, ((store, "watch"), (store, "get")))
    store.close()


@contextmanager
def registration(folder: Path) -> Iterator[Scene]:
    """A gateway's record, whose lease is lost."""
    store = MemoryStore()
    record = GatewayRecord(name="g", pid=1, url="", admin_url="")

    def provoke() -> None:
        if (found := store.get(KEYS.gateway("g"))) is not None:
            store.revoke(found.lease)

    with Registration(store, "c", record, 0.6):
        eventually(lambda: store.get(KEYS.gateway("g")), T, "the record")
        yield Scene(provoke, lambda: store.get(KEYS.gateway("g")), ((store, "grant"), (store, "put")))
    store.close()


@contextmanager
def engine_status(folder: Path) -> Iterator[Scene]:
    """An engine's status, which changes."""
    store, epoch = MemoryStore(), [0]
    token = store.put(KEYS.engine, b"{}")
    lease = store.grant(60.0)
    writer = StatusWriter(store, KEYS, token, lambda: lease, on_fenced=lambda: None)

    def provoke() -> None:
        epoch[0] += 1
        writer.update(EngineStatus(token=token, epoch=epoch[0]))

    def done() -> bool:
        found = store.get(KEYS.engine_status)
        return found is not None and b'"epoch":%d' % epoch[0] in found.value

    try:
        yield Scene(provoke, done, ((store, "txn"),))
    finally:
        writer.close()
        store.close()


@contextmanager
def store_guard(folder: Path) -> Iterator[Scene]:
    """A guard that looks every second, and must go on looking."""
    store, looks, seen = MemoryStore(), [0], [0]
    real = store.get

    def get(key: str) -> Any:
        looks[0] += 1
        return real(key)

    store.get = get  # type: ignore[method-assign]
    guard = StoreGuard(store, KEYS.config, on_replaced=lambda replaced: None, period_s=0.01)
    try:
        yield Scene(lambda: seen.__setitem__(0, looks[0]), lambda: looks[0] > seen[0], ((store, "get"),))
    finally:
        guard.close()
        store.close()


@contextmanager
def controller(folder: Path) -> Iterator[Scene]:
    """A controller whose leadership is lost: it campaigns again, with a new lease and a thread that keeps it."""
    store = MemoryStore()
    config = ClusterConfig(cluster="c", model="m", served_model_name="m", moe_layers=1, experts=2, lease_ttl_s=0.6)
    store.put(KEYS.config, encode(config))
    stop, events = threading.Event(), EventLog(folder / "events.jsonl", "controller")
    thread = threading.Thread(target=run_controller, args=(store, "c", "n", stop, events), name="loop")
    thread.start()

    def provoke() -> None:
        if (found := store.get(KEYS.leader)) is not None:
            store.revoke(found.lease)

    try:
        eventually(lambda: store.get(KEYS.leader), T, "a leader")
        yield Scene(
            provoke, lambda: store.get(KEYS.leader), ((store, "grant"), (threading.Thread, "start")), thread.is_alive
        )
    finally:
        stop.set()
        thread.join(T)
        store.close()


@contextmanager
def handover_accepts(folder: Path) -> Iterator[Scene]:
    """A listener, one link that must stay, and others that are to come."""
    server, client = Handover(), Handover()
    server.serve("r", lambda link, request, fds: Grant(b"reply"))
    first = client.connect(server.address, "r")
    links, answers = [first], list[threading.Thread]()

    def provoke() -> None:
        def connect() -> None:
            while True:
                try:
                    return links.append(client.connect(server.address, "r", timeout_s=T))
                except QueueClosed:  # it could not be taken care of: ask again, as its users do
                    continue

        answers.append(threading.Thread(target=connect, name="client"))
        answers[-1].start()

    try:
        calls = ((socket.socket, "accept"), (handover, "Link"))
        yield Scene(provoke, lambda: len(links) == len(answers) + 1, calls, lambda: not first.peer_closed())
    finally:
        for thread in answers:
            thread.join(T)
        client.close()
        server.close()


@contextmanager
def gateway_server(folder: Path) -> Iterator[Scene]:
    """An engine's server, and a gateway that says hello."""
    server = EngineServer(lambda: None)
    server.serve(7)
    decoder = msgspec.msgpack.Decoder(ToGateway)
    with ExitStack() as opened:
        opened.callback(server.close)
        context = opened.enter_context(zmq.Context())
        gateway = opened.enter_context(context.socket(zmq.DEALER))
        gateway.connect(server.address)
        hello = msgspec.msgpack.encode(Hello("g"))

        def done() -> bool:
            gateway.send(hello)
            return bool(gateway.poll(200)) and decoder.decode(gateway.recv()) == Welcome(7)

        calls = ((zmq.Socket, "recv_multipart"), (zmq.Socket, "send_multipart"))
        yield Scene(lambda: gateway.send(hello), done, calls)


@contextmanager
def remote_queue(folder: Path) -> Iterator[Scene]:
    """The thread of a remote queue's sockets, whose turn fails."""
    made, turns, seen = SocketThread("loop"), Turns(), [0]
    made.start(turns.turn, {})

    def provoke() -> None:
        seen[0] = turns.count
        made.wake()

    try:
        yield Scene(provoke, lambda: (made.wake(), turns.count > seen[0])[1], ((turns, "work"),))
    finally:
        made.stop()


class Turns:
    """Counts what is done in a loop."""

    count = 0

    def work(self) -> None:
        """What may fail."""

    def turn(self) -> None:
        self.work()
        self.count += 1


@contextmanager
def events(folder: Path) -> Iterator[Scene]:
    """A role that writes events."""
    log, asked = EventLog(folder / "events.jsonl", "r"), [0]
    wake = threading.Event()

    def turn() -> None:
        if wake.wait(0.01):
            log.emit("tick", n=asked[0])

    thread, stop = _running(turn)

    def provoke() -> None:
        asked[0] += 1
        wake.set()

    def done() -> bool:
        return any(event.fields.get("n") == asked[0] for event in EventLog.read(folder / "events.jsonl"))

    try:
        yield Scene(provoke, done, ((os, "open"), (os, "write"), (os, "fstat")), thread.is_alive)
    finally:
        stop.set()
        thread.join(T)


LOOPS = (
    Loop("elastic/serve/roles.py", ("fork", "pidfd_open", "read after the fork", "open of the log"), supervisor),
    Loop("workers/agent/forkserver.py", ("fork", "pidfd_open"), forkserver),
    Loop("workers/agent/agent.py", ("pipe", "pidfd_open", "send", "receive", "thread"), agent_of_ranks),
    Loop("workers/agent/registrar.py", ("put",), registrar),
    Loop("membership/store/lease.py", ("keepalive",), lease),
    Loop("membership/store/mirror.py", ("watch", "get"), mirror),
    Loop("membership/planning/controller.py", ("grant", "thread"), controller),
    Loop("membership/base/events.py", ("open", "write", "fstat"), events),
    Loop("elastic/gateway/registration.py", ("grant", "put"), registration),
    Loop("elastic/engine/status_writer.py", ("txn",), engine_status),
    Loop("elastic/engine/gateway_server.py", ("receive", "send"), gateway_server),
    Loop("elastic/serve/store_guard.py", ("get",), store_guard),
    Loop("workers/ipc/handover.py", ("accept", "credentials"), handover_accepts),
    Loop("workers/queue/remote_wire.py", ("turn",), remote_queue),
)
OTHERS = {  # files that start threads, and why they are not in the table
    "membership/base/starter.py": "it only polls",
    "elastic/serve/probe.py": "socketserver's own loop, which reports what a request raised and goes on",
    "elastic/serve/trace_export.py": "the last export: it ends with its only call, or with the process",
    "elastic/serve/log_stream.py": "it runs its only step through Attempts, as the others do",
    "membership/store/etcd_watch.py": "its owner, the mirror, opens another watch after any end",
    "workers/agent/executor.py": "part of the agent's scene",
    "workers/agent/forkserver_client.py": "part of the agent's scene",
    "workers/agent/cross_host.py": "not wired into the agent yet",
    "workers/ipc/sockets.py": "the relay only waits and rings; where no thread is to be had its owner goes on without",
    "workers/fleet/fleet.py": "the joiner: it runs its only step through Attempts, as the others do",
    "workers/protocol/liveness.py": "the heartbeat only counts; the death watcher is part of the agent's scene",
    "workers/rank/early_reads.py": "hands on what a read raised",
    "workers/rank/loading.py": "hands on what the load raised",
    "workers/rank/output.py": "hands on what an output raised",
    "workers/rank/preparation.py": "hands on what it raised",
    "workers/rank/worker_proc.py": "the death pipe: it only polls",
}
