"""One rank's process: how a parent makes it and waits for it, and what it does until it ends.

It comes from the forkserver with three descriptors: the ready pipe, on which it says that it is ready and how it is
reached; the death pipe, whose end of file says that its parent is gone; and the host's lock. Then one thread serves,
on one doorbell, the parent's calls, the engine's steps and the peers' rows (`worker_busy_loop`).
"""

from __future__ import annotations

import os
import pickle
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import cloudpickle
import msgspec
import structlog
from opentelemetry import trace

from membership.base import failpoints
from membership.base.errors import Fenced, QueueClosed, RankDied, RankError, WaitTimeout
from membership.base.logs import configure, identify
from membership.store.records import ClusterConfig
from workers.agent.forkserver_client import ForkServer
from workers.agent.handles import UnreadyWorkerProcHandle, WorkerProcHandle
from workers.ipc.cpu_priority import at_low_priority
from workers.ipc.doorbell import Doorbell
from workers.protocol.liveness import LivenessPage
from workers.protocol.restart_policy import FENCED_STATUS
from workers.protocol.rpc import SPARE, Call, RankKey, ResponseStatus, WireCall, WireReply, failure_of
from workers.queue.message_queue import MessageQueue, MsgpackCodec
from workers.rank.call_port import CallPort
from workers.rank.engine_port import EnginePort
from workers.rank.environment import (
    HostLock,
    destroy_parallel_groups,
    frozen_environment,
    set_name,
    signals_end_it_once,
)
from workers.rank.worker_api import AsyncOutput, Worker, WorkerContext, load_worker_class

PARENT_READER = "parent"
JOIN_TIMEOUT_S = 10.0
IDLE_S = 1.0
ORPHAN_GRACE_S = 1.0
REFUSAL_TIMEOUT_S = 1.0
MAX_READY_BYTES = 64 * 1024

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Launch:
    """What a rank is told at its birth."""

    key: RankKey
    node: str
    config: ClusterConfig
    worker_class: str
    input_handle: bytes  # queue of its parent's calls
    external_input_handles: tuple[bytes, ...] = ()  # queues of callers on other hosts (nnodes > 1)
    scale_up: bool = True  # elastic launch: the device and the model come later, by calls
    weights: bytes = b""  # the host's weight store


class Ready(msgspec.Struct, frozen=True):
    """What a rank says on its ready pipe."""

    status: str
    handle: bytes = b""  # queue of its replies
    peer_response_handles: list[bytes] = []
    liveness: bytes = b""
    exchange: bytes = b""
    error: str = ""


class WorkerProc:
    """The rank's main object; and, as static methods, what its parent does to get one."""

    READY_STR = "READY"
    ResponseStatus = ResponseStatus

    def __init__(self, launch: Launch, death_reader: int, host_lock: HostLock) -> None:
        self.key = launch.key
        self.rank = launch.key[0]
        self.shutdown_requested = threading.Event()
        self._ended = threading.Event()
        self.ports: list[CallPort] = []
        self._initialised, self._limit_s = not launch.scale_up, launch.config.launch_deadline_s
        with ExitStack() as undo, trace.get_tracer("elastic_ep.workers").start_as_current_span("Worker init"):
            self.doorbell = undo.enter_context(Doorbell())
            self.monitor_death_pipe(death_reader, self.shutdown_requested)
            self.liveness = LivenessPage.create()
            undo.callback(self.liveness.close)
            self.doorbell.on_slept = self.liveness.slept
            context = WorkerContext(
                rank=self.rank, incarnation=launch.key[1], node=launch.node, config=launch.config,
                doorbell=self.doorbell, environ=frozen_environment(), host_lock=host_lock, weights=launch.weights,
            )  # fmt: skip
            self.worker: Worker = load_worker_class(launch.worker_class)(context)
            undo.callback(self.worker.shutdown)
            if not launch.scale_up:
                self.worker.init_device()
            undo.callback(self._close_queues)
            self._init_message_queues(launch)
            if not launch.scale_up:
                self.worker.load_model()
            self.setup_proc_title_and_log_prefix(self.rank, grouped=True)
            self.engine = EnginePort(self.key, self.worker, self.doorbell, self.liveness.progress)
            undo.pop_all()

    # --- in the parent ------------------------------------------------------------------------------------------

    @staticmethod
    def make_worker_process(launch: Launch, forkserver: ForkServer, host_lock: int) -> UnreadyWorkerProcHandle:
        """Ask for a rank; returns at once, so that many start at the same time."""
        ready_reader, ready_writer = os.pipe()
        death_reader, death_writer = os.pipe()
        forked = forkserver.fork(
            "workers.rank.worker_proc:run_rank", pickle.dumps(launch), [ready_writer, death_reader, host_lock]
        )
        os.close(ready_writer)
        os.close(death_reader)
        return UnreadyWorkerProcHandle(launch.key, forked, ready_reader, death_writer)

    @staticmethod
    def wait_each(
        unready: Sequence[UnreadyWorkerProcHandle], timeout_s: float
    ) -> Iterator[tuple[UnreadyWorkerProcHandle, Ready | RankError | WaitTimeout]]:
        """Each rank with its ready message, or with why there will be none, as they come: all pipes at once."""
        deadline = time.monotonic() + timeout_s
        waiting = {handle.ready_reader: handle for handle in unready}
        poller = select.poll()
        for fd in waiting:
            poller.register(fd, select.POLLIN)
        while waiting:
            left = deadline - time.monotonic()
            heard = poller.poll(max(0.0, left) * 1000)
            for fd, _ in heard:
                poller.unregister(fd)
                handle = waiting.pop(fd)
                yield handle, _ready_from(handle)
            if not heard and left <= 0:
                for handle in waiting.values():
                    yield handle, WaitTimeout(f"{handle.name} was not ready within {timeout_s:g} s")
                return

    @staticmethod
    def wait_for_ready(
        unready: Sequence[UnreadyWorkerProcHandle], timeout_s: float, doorbell: Doorbell
    ) -> list[WorkerProcHandle]:
        """All of them, ready; the first failure ends the wait, names its rank, and lets all of them go."""
        ready: dict[RankKey, WorkerProcHandle] = {}
        for handle, outcome in WorkerProc.wait_each(unready, timeout_s):
            if not isinstance(outcome, Ready):
                for made in ready.values():
                    made.close()
                for left in unready:
                    left.close()
                raise outcome
            ready[handle.key] = WorkerProc.wait_for_response_handle_ready(outcome, handle, doorbell)
        return [ready[handle.key] for handle in unready]

    @staticmethod
    def wait_for_response_handle_ready(
        ready: Ready, unready: UnreadyWorkerProcHandle, doorbell: Doorbell, timeout_s: float = JOIN_TIMEOUT_S
    ) -> WorkerProcHandle:
        """Join the rank's queue of replies and map its liveness page."""
        with ExitStack() as undo:
            child = unready.forked.result(timeout=timeout_s)
            replies = MessageQueue.create_from_handle(ready.handle, PARENT_READER, doorbell, timeout_s=timeout_s)
            undo.callback(replies.shutdown)
            liveness = LivenessPage.attach(ready.liveness)
            undo.pop_all()
        return WorkerProcHandle.from_unready_handle(
            unready, child, replies, ready.peer_response_handles, liveness, ready.liveness, ready.exchange
        )

    @staticmethod
    def join_peer(key: RankKey, peer_response_handle: bytes, doorbell: Doorbell) -> MessageQueue:
        """On another host: join the queue of that rank's replies to us."""
        codec = MsgpackCodec(WireReply)
        return MessageQueue.create_from_handle(
            peer_response_handle, PARENT_READER, doorbell, timeout_s=JOIN_TIMEOUT_S, codec=codec
        )

    # --- in the rank --------------------------------------------------------------------------------------------

    @staticmethod
    def worker_main(launch: Launch, ready_writer: int, death_reader: int, host_lock: int) -> None:
        """A rank's whole life, from its birth to its exit status."""
        signals = signals_end_it_once()
        WorkerProc.setup_proc_title_and_log_prefix(launch.key[0], grouped=False)
        configure("worker", rank=launch.key[0], incarnation=launch.key[1], pid=os.getpid())
        failpoints.arm("rank")
        proc = None
        try:
            proc = WorkerProc(launch, death_reader, HostLock(host_lock))
            _tell(ready_writer, proc.ready())
            os.close(ready_writer)
            failpoints.hit("rank.registered", proc.rank)
            proc.worker_busy_loop()
        except Exception as error:
            if proc is None:
                why = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
                _tell(ready_writer, Ready("FAILED", error=why))
            elif isinstance(error, Fenced):
                log.warning("rank_fenced", reason=str(error))
            else:
                log.exception("rank_failed")
            sys.exit(FENCED_STATUS if isinstance(error, Fenced) else 1)
        finally:
            signals.set()
            if proc is not None:
                proc.shutdown()

    def ready(self) -> Ready:
        """What goes up the ready pipe."""
        return Ready(
            self.READY_STR,
            self.ports[0].replies.export_handle().encode(),
            self.peer_response_handles,
            self.liveness.export_handle(),
            self.worker.exchange_handle(),
        )

    def _init_message_queues(self, launch: Launch) -> None:
        """Join our parent's queue of calls, then those of callers on other hosts; make a queue of replies to each.

        A rank waits for nobody here or later: who calls has joined its replies, and waits for it (`wait_until_ready`).
        If it waited for its parent too, it would miss one that comes and goes.
        """
        for number, handle in enumerate((launch.input_handle, *launch.external_input_handles)):
            self.ports.append(CallPort(self.key, handle, number, self.doorbell))
        self.peer_response_handles = [port.replies.export_handle().encode() for port in self.ports[1:]]

    def monitor_death_pipe(self, death_reader: int, shutdown_requested: threading.Event) -> None:
        """Watch for the parent's end in a thread; then end too, at once if the main thread does not react."""

        def watch() -> None:
            poller = select.poll()
            poller.register(death_reader, select.POLLIN)
            while not self._ended.is_set():
                if poller.poll(IDLE_S * 1000):
                    log.info("parent_gone", rank=self.rank)
                    shutdown_requested.set()
                    self.doorbell.ring()
                    if not self._ended.wait(timeout=ORPHAN_GRACE_S):
                        os._exit(1)
                    return

        threading.Thread(target=watch, name="death-pipe", daemon=True).start()

    def worker_busy_loop(self) -> None:
        """Serve parent, engine and peers until asked to stop."""
        while not self.shutdown_requested.is_set():
            busy = self._serve_callers()
            busy |= self.engine.serve()
            self.worker.poll()
            if not busy:
                self.doorbell.wait(self._anything, IDLE_S)

    def _anything(self) -> bool:
        return (
            self.engine.pending()
            or self.worker.pending()
            or any(port.calls.pending() for port in self.ports)
            or self.shutdown_requested.is_set()
        )

    def _serve_callers(self) -> bool:
        busy = False
        for port in tuple(self.ports):
            try:
                call = port.take()
            except QueueClosed as closed:
                self._caller_gone(port, str(closed))
                continue
            if call is not None:
                self._run(port, call)
                busy = True
        return busy

    def _caller_gone(self, port: CallPort, reason: str) -> None:
        """Without its parent a rank ends; a caller on another host may come and go."""
        log.info("caller_gone", rank=self.rank, reason=reason)
        if port is self.ports[0]:
            self.shutdown_requested.set()
        else:
            self.ports.remove(port)
            port.close()

    def _run(self, port: CallPort, call: Call | WireCall) -> None:
        try:
            failpoints.hit(f"rank.{call.method!s}", self.rank)
            if isinstance(call, WireCall):
                output = self._named(call.method)(*call.args, **call.kwargs)
            else:
                args, kwargs = cloudpickle.loads(call.arguments)
                output = self._method(call.method)(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - it goes to the caller
            output = failure_of(error, traceback.format_exc())
        self.handle_output(port, call, output)
        port.key = self.key  # a spare has replied under its own before it goes by the rank's

    def _method(self, method: str | bytes) -> Callable[..., Any]:
        """A method by name, or a callable that takes the worker: only our own parent can send one."""
        return self._named(method) if isinstance(method, str) else partial(cloudpickle.loads(method), self.worker)

    def _named(self, method: str) -> Callable[..., Any]:
        if method in ("attach_engine", "initialise", "become"):
            return self.engine.attach if method == "attach_engine" else getattr(self, method)
        if method.startswith("_"):
            raise AttributeError(f"{method} is private")
        return getattr(self.worker, method)  # type: ignore[no-any-return]

    def initialise(self) -> str:
        """What an elastic launch left out: the device and the model. Returns the worker's fingerprint, if any."""
        if not self._initialised:
            self.worker.init_device()
            if self.rank == SPARE:  # nobody waits for it, and the ranks have work to do
                at_low_priority(self.worker.load_model, self._limit_s, "a spare's model")
            else:
                self.worker.load_model()
            self._initialised = True
        return str(getattr(self.worker, "fingerprint", str)())

    def become(self, key: RankKey) -> bytes:
        """A spare becomes this rank, as whom its parent calls it from the next call on; where peers reach it."""
        if self.rank != SPARE:
            raise RankError(f"rank {self.rank} cannot become rank {key[0]}")
        self.worker.become(*key)
        self.key, self.rank = key, key[0]
        self.engine.key = key
        identify(rank=key[0], incarnation=key[1])
        self.setup_proc_title_and_log_prefix(self.rank, grouped=True)
        return self.worker.exchange_handle()

    def handle_output(self, port: CallPort, call: Call | WireCall, output: Any) -> None:
        """Reply now, or have the output thread reply when the output is there."""
        if isinstance(output, AsyncOutput):
            self.async_output_busy_loop(port, call, output)
        else:
            self.enqueue_output(port, call, output)

    def async_output_busy_loop(self, port: CallPort, call: Call | WireCall, output: AsyncOutput) -> None:
        """Give the output to the thread that waits for the outputs of this caller's calls (`OutputThread`)."""
        port.await_output(call, output)

    def enqueue_output(self, port: CallPort, call: Call | WireCall, output: Any) -> None:
        """Reply to whoever called."""
        port.reply(call, output)

    def shutdown(self) -> None:
        """Free everything, in the reverse order of its making."""
        failpoints.hit("rank.shutdown", self.rank)
        self.shutdown_requested.set()
        self.engine.close()
        self.worker.shutdown()
        destroy_parallel_groups()
        self._close_queues()
        self.liveness.close()
        self.doorbell.close()
        self._ended.set()

    def _close_queues(self) -> None:
        for port in self.ports:
            port.close()

    @staticmethod
    def setup_proc_title_and_log_prefix(rank: int, *, grouped: bool) -> None:
        """Name the process. Attention is data-parallel and experts are spread, both over all ranks: DP and EP agree."""
        name = f"Worker_DP{rank}_EP{rank}" if grouped else f"Worker_{rank}"
        set_name("Spare" if rank == SPARE else name)


def run_rank(payload: bytes, fds: list[int]) -> None:
    """The forkserver's target. The payload comes from our own parent."""
    WorkerProc.worker_main(pickle.loads(payload), *fds)  # noqa: S301


def _ready_from(handle: UnreadyWorkerProcHandle) -> Ready | RankError:
    data = os.read(handle.ready_reader, MAX_READY_BYTES)
    if not data:
        reason = "ended before it was ready"
        with suppress(TimeoutError, CancelledError):
            reason = str(handle.forked.exception(timeout=REFUSAL_TIMEOUT_S) or reason)
        return RankDied(f"{handle.name}: {reason}")
    ready = msgspec.msgpack.decode(data, type=Ready)
    if ready.status != WorkerProc.READY_STR:
        return RankError(f"{handle.name} could not start: {ready.error}")
    return ready


def _tell(ready_writer: int, message: Ready) -> None:
    with suppress(BrokenPipeError):  # the parent gave up on us: its death pipe says so
        os.write(ready_writer, msgspec.msgpack.encode(message))
