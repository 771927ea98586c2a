"""WorkerProc, the child's half: what a rank process does from its start (`run_rank`) to its exit status.

One thread serves, on one doorbell, the parent's calls, the engine's steps and the peers' rows (`worker_busy_loop`).
Another one watches the death pipe: the end of the parent is the end of its ranks. The parent's half is
`workers/agent/worker_proc.py`.
"""

from __future__ import annotations

import os
import pickle
import select
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import cloudpickle
import msgspec
import structlog
from opentelemetry import trace

from membership.base import failpoints
from membership.base.errors import DeviceFull, DeviceLost, Fenced, QueueClosed, RankError, WaitTimeout
from membership.base.logs import configure, identify
from membership.base.rank_id import NO_SLOT, RankId, SpareId, labels
from membership.base.timing import ORPHAN_GRACE_S
from workers.ipc.doorbell import Doorbell
from workers.ipc.handover import close_default
from workers.ipc.host_lock import HostLock
from workers.protocol.device_note import DeviceNote
from workers.protocol.identity import Identity
from workers.protocol.launch import FAILED_STR, READY_STR, Launch, Ready
from workers.protocol.liveness import LivenessPage
from workers.protocol.rpc import AnyCall, ResponseStatus, failure_of
from workers.protocol.step_fence import FENCED_STATUS, FULL_STATUS, LOST_STATUS
from workers.rank.call_port import CallPort
from workers.rank.engine_port import EnginePort
from workers.rank.environment import destroy_parallel_groups, frozen_environment, set_name, signals_end_it_once
from workers.rank.loading import Loading
from workers.rank.worker_api import AsyncOutput, Worker, WorkerContext, load_worker_class

IDLE_S = 1.0
LOADING_STOP_S = 0.5  # a read cannot be broken off, and ends with the process

log = structlog.get_logger(__name__)


class WorkerProcChild:
    """The main object of a rank process. The whole `WorkerProc` is `workers/worker_proc.py`."""

    READY_STR = READY_STR
    ResponseStatus = ResponseStatus

    def __init__(self, launch: Launch, death_reader: int, host_lock: HostLock, pool: int = -1) -> None:
        self.key = launch.key
        self.rank = launch.key.slot
        self.shutdown_requested = threading.Event()
        self._ended = threading.Event()
        self.peers: list[CallPort] = []  # callers on other hosts (nnodes > 1): none on a single host
        self._initialised = not launch.scale_up
        self._loading: Loading | None = None
        with ExitStack() as undo, trace.get_tracer("elastic_ep.workers").start_as_current_span("Worker init"):
            self.doorbell = undo.enter_context(Doorbell())
            self.monitor_death_pipe(death_reader, self.shutdown_requested)
            self.liveness = LivenessPage.create()
            undo.callback(self.liveness.close)
            self.doorbell.on_slept = self.liveness.slept
            self.worker: Worker = load_worker_class(launch.worker_class)(self._context(launch, host_lock, pool))
            undo.callback(self.worker.shutdown)
            if not launch.scale_up:
                self.worker.init_device()
            self._init_message_queues(launch, undo)
            if not launch.scale_up:
                self.worker.load_model()
            self.setup_proc_title_and_log_prefix(self.rank, grouped=True)
            member = self.key if isinstance(self.key, RankId) else None
            self.engine = EnginePort(member, self.worker, self.doorbell, self.liveness.progress, launch.network)
            undo.pop_all()

    def _context(self, launch: Launch, host_lock: HostLock, pool: int) -> WorkerContext:
        rank, incarnation = labels(launch.key)
        return WorkerContext(
            rank=rank,
            incarnation=incarnation,
            node=launch.node,
            config=launch.config,
            doorbell=self.doorbell,
            environ=frozen_environment(),
            host_lock=host_lock,
            weights=launch.weights,
            pools=launch.pools,
            windows=launch.windows,
            experts=launch.experts,
            called_off_at=self.liveness.called_off_at,
            pool_fd=pool,
            notes=self.liveness.notes,
            progress=self.liveness.load_progress,
            network=launch.network,
            look_ahead=lambda: self.engine.look_ahead(),  # it is made after the worker
        )

    @staticmethod
    def worker_main(launch: Launch, ready_writer: int, death_reader: int, host_lock: int, pool: int = -1) -> None:
        """Run a rank from its start to its end; SystemExit carries its exit status. All descriptors are its own."""
        signals = signals_end_it_once()
        rank, incarnation = labels(launch.key)
        WorkerProcChild.setup_proc_title_and_log_prefix(rank, grouped=False)
        configure("worker", rank=rank, incarnation=incarnation, pid=os.getpid())
        failpoints.arm("rank")
        proc = None
        try:
            proc = WorkerProcChild(launch, death_reader, HostLock(host_lock), pool)
            _report(ready_writer, proc.ready())
            os.close(ready_writer)
            failpoints.hit("rank.registered", proc.rank)
            proc.worker_busy_loop()
        except Exception as error:
            if isinstance(error, DeviceLost):
                full = isinstance(error, DeviceFull)
                log.error("device_full" if full else "device_lost", reason=str(error))
                if proc is not None:
                    proc.liveness.notes.write(DeviceNote(last_words=str(error), full=full))
                # At once: to end in order asks more of the device, which may wait for ever.
                os._exit(FULL_STATUS if full else LOST_STATUS)
            if proc is None:
                why = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
                _report(ready_writer, Ready(FAILED_STR, error=why))
            elif isinstance(error, Fenced):
                log.warning("rank_fenced", reason=str(error))
            else:
                log.exception("rank_failed")
            sys.exit(FENCED_STATUS if isinstance(error, Fenced) else 1)
        finally:
            signals.set()
            if proc is not None:
                proc.shutdown()
            close_default()  # a fork leaves without `atexit`

    def ready(self) -> Ready:
        """The message for the ready pipe."""
        return Ready(
            self.READY_STR,
            self.parent.replies.export_handle().encode(),
            [peer.replies.export_handle().encode() for peer in self.peers],
            self.liveness.handle(),
            self.worker.exchange_handle(),
        )

    def _init_message_queues(self, launch: Launch, undo: ExitStack) -> None:
        """Join the parent's queue of calls, then those of callers on other hosts; make a queue of replies to each.

        A rank never waits for a caller. A caller joins the queue of replies and waits for the rank
        (`wait_until_ready`), so a caller that comes and goes leaves no rank waiting.
        """
        self.parent = CallPort(self.key, launch.input_handle, 0, self.doorbell)
        undo.callback(self.parent.close)
        if launch.external_input_handles:
            from workers.rank.cross_host_port import CrossHostPort

            for number, handle in enumerate(launch.external_input_handles, start=1):
                self.peers.append(CrossHostPort(self.key, handle, number, self.doorbell))
                undo.callback(self.peers[-1].close)

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
            or self.parent.calls.pending()
            or any(peer.calls.pending() for peer in self.peers)
            or self.shutdown_requested.is_set()
        )

    def _serve_callers(self) -> bool:
        busy = False
        try:
            busy = self._serve(self.parent)
        except QueueClosed as closed:  # without its parent a rank ends
            self._log_gone(closed)
            self.shutdown_requested.set()
        for peer in tuple(self.peers):
            try:
                busy |= self._serve(peer)
            except QueueClosed as closed:  # a caller on another host may come and go
                self._log_gone(closed)
                self.peers.remove(peer)
                peer.close()
        return busy

    def _log_gone(self, closed: QueueClosed) -> None:
        log.info("caller_gone", rank=self.rank, reason=str(closed))

    def _serve(self, port: CallPort) -> bool:
        call = port.take()
        if call is None:
            return False
        try:
            failpoints.hit(f"rank.{call.method!s}", self.rank)
            args, kwargs = port.arguments(call)
            output = self._method(call.method)(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the caller gets it
            output = failure_of(error, traceback.format_exc())
        self.handle_output(port, call, output)
        port.key = self.key  # a spare replies under its own key before it uses the rank's
        return True

    def _method(self, method: str | bytes) -> Callable[..., Any]:
        """A method by name, or a callable that takes the worker: only our own parent can send one."""
        return self._named(method) if isinstance(method, str) else partial(cloudpickle.loads(method), self.worker)

    def _named(self, method: str) -> Callable[..., Any]:
        if method in ("attach_engine", "initialise", "become"):
            return self.engine.attach if method == "attach_engine" else getattr(self, method)
        if method.startswith("_"):
            raise AttributeError(f"{method} is private")
        return getattr(self.worker, method)  # type: ignore[no-any-return]

    def initialise(self) -> Identity | Loading:
        """What an elastic launch left out: the device and the model. The output is what the worker has loaded."""
        if self._initialised:
            return self._loaded()
        if self._loading is None or self._loading.failed:
            self.worker.init_device()
            spare = isinstance(self.key, SpareId)  # it can wait, and the ranks have work to do
            self._loading = Loading(self._load, self.liveness.load_progress, low_priority=spare)
        return self._loading

    def _load(self) -> Identity:
        self.worker.load_model()
        self._initialised = True
        return self._loaded()

    def _loaded(self) -> Identity:
        found: Identity = getattr(self.worker, "identity", Identity)()
        return found

    def become(self, key: RankId) -> bytes:
        """Turn a spare into the rank `key`: its parent uses that from the next call on. Returns the exchange handle."""
        if not isinstance(self.key, SpareId):
            raise RankError(f"{self.key} cannot become {key}")
        self.worker.become(*key)
        self.key, self.rank = key, key.rank
        self.engine.become(key)
        for peer in self.peers:
            peer.key = key
        identify(rank=key.rank, incarnation=key.incarnation)
        self.setup_proc_title_and_log_prefix(self.rank, grouped=True)
        return self.worker.exchange_handle()

    def handle_output(self, port: CallPort, call: AnyCall, output: Any) -> None:
        """Reply now, or have the output thread reply when the output is there."""
        if isinstance(output, AsyncOutput):
            self.async_output_busy_loop(port, call, output)
        else:
            self.enqueue_output(port, call, output)

    def async_output_busy_loop(self, port: CallPort, call: AnyCall, output: AsyncOutput) -> None:
        """Give the output to the thread that waits for the outputs of this caller's calls (`OutputThread`)."""
        port.await_output(call, output)

    def enqueue_output(self, port: CallPort, call: AnyCall, output: Any) -> None:
        """Reply to the caller."""
        port.reply(call, output)

    def shutdown(self) -> None:
        """Free everything, in the reverse order of its making."""
        failpoints.hit("rank.shutdown", self.rank)
        self.shutdown_requested.set()
        self.engine.close()
        if self._loading is not None:
            with suppress(WaitTimeout):
                self._loading.join(LOADING_STOP_S)
        self.worker.shutdown()
        destroy_parallel_groups()
        for port in (self.parent, *self.peers):
            port.close()
        self.liveness.close()
        self.doorbell.close()
        self._ended.set()

    @staticmethod
    def setup_proc_title_and_log_prefix(rank: int, *, grouped: bool) -> None:
        """Name the process. Attention is data-parallel and experts are spread, both over all ranks: DP and EP agree."""
        name = f"Worker_DP{rank}_EP{rank}" if grouped else f"Worker_{rank}"
        set_name("Spare" if rank == NO_SLOT else name)


def run_rank(payload: bytes, fds: list[int]) -> None:
    """The first function in a rank process: the forkserver calls it (`launch.RANK_MAIN`) with our parent's payload."""
    WorkerProcChild.worker_main(pickle.loads(payload), *fds)  # noqa: S301


def _report(ready_writer: int, message: Ready) -> None:
    with suppress(BrokenPipeError):  # the parent gave up on us: its death pipe says so
        os.write(ready_writer, msgspec.msgpack.encode(message))
