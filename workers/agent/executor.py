"""The parent of all ranks of one host: starts them, calls them, learns of their deaths, ends them.

A death fails only the calls that asked that rank. One thread (the collector) reads replies, handles deaths and releases
ranks; it waits on one doorbell. Waits for a process (start, end) run in threads of their own, which post to it.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cloudpickle
import structlog

from membership.base import failpoints
from membership.base.attempts import Attempts, is_shortage
from membership.base.enums import DetectedBy
from membership.base.errors import ElasticError, NoResources, QueueClosed, RankDied, RankError
from membership.base.network import Network
from membership.base.rank_id import ProcessId, RankId, SpareId
from membership.store.records import ClusterConfig, ClusterState
from workers.agent.death_notices import DeathNotices
from workers.agent.forkserver import Serving
from workers.agent.forkserver_client import ForkServer
from workers.agent.gpu_windows import GpuWindows
from workers.agent.handles import UnreadyWorkerProcHandle, WorkerProcHandle, send_signal
from workers.agent.kv_pools import KvPools
from workers.agent.peer_hosts import PeerHosts
from workers.agent.preload import preload_for
from workers.agent.weight_store import OnEvent, WeightStore
from workers.agent.worker_proc import WorkerProcParent
from workers.ipc.doorbell import Doorbell
from workers.ipc.host_lock import HostLock
from workers.protocol.launch import Launch, Ready
from workers.protocol.liveness import DeathWatcher
from workers.protocol.rpc import Call, CallTable, Outcome, PendingCall, Reply
from workers.queue.message_queue import MessageQueue

COLLECT_S = 0.1
SEND_TIMEOUT_S = 2.0
LOOK_S = 0.05  # between two looks at whether the ladder is to be left out
LADDER_S = (2.0, 1.0, 5.0)  # max wait after each rung: closed pipe, SIGTERM, SIGKILL
STOP_TIMEOUT_S = 10.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Death:
    """A rank that ended unasked."""

    key: ProcessId
    pid: int
    detected_by: DetectedBy


@dataclass(frozen=True)
class Elsewhere:
    """What the ranks of this host are given of other hosts."""

    network: Network | None = None
    callers: tuple[bytes, ...] = ()  # handles of the queues of calls that come from there


NOWHERE = Elsewhere()
OnStarted = Callable[[ProcessId, WorkerProcHandle | ElasticError], None]


class MultiprocExecutor:
    """Owns the forkserver, the queue of calls, and every rank made through it."""

    def __init__(
        self,
        config: ClusterConfig,
        node: str,
        *,
        worker_class: str,
        scale_up: bool = True,
        elsewhere: Elsewhere = NOWHERE,
        on_serving: Callable[[Serving], None] | None = None,
        on_weights: OnEvent | None = None,
    ) -> None:
        self.workers: dict[ProcessId, WorkerProcHandle] = {}
        self._config, self._node, self._worker_class, self._scale_up = config, node, worker_class, scale_up
        self._lock = threading.Lock()
        self._calls = CallTable()
        self._elsewhere = elsewhere
        self._failure_callbacks: list[Callable[[Death], None]] = []
        self._exit_callbacks: list[Callable[[int, int], None]] = []
        self._going: set[ProcessId] = set()
        self._starting: dict[ProcessId, UnreadyWorkerProcHandle] = {}
        self._jobs: set[threading.Thread] = set()
        self._unstarted: deque[threading.Thread] = deque()
        self._attempts = Attempts("executor")
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._host_lock = HostLock.create()
        self._doorbell = Doorbell()
        self.weights = WeightStore(on_weights, config.load_bytes_per_s)
        self.peers = PeerHosts(config, node, self.weights)
        self._notices = DeathNotices(node)
        self.pools = KvPools(self._writes_no_more)
        self._windows, self._experts = GpuWindows(), GpuWindows()
        self.rpc_broadcast_mq = MessageQueue(f"{node}-calls")
        preload = preload_for(worker_class, config.model, config.dtype)
        self._new_forkserver = partial(ForkServer, preload, on_exit=self._on_exit, on_serving=on_serving)
        self._forkserver = self._new_forkserver()
        self._collector = threading.Thread(target=self._collect, name="executor-replies", daemon=True)
        self._collector.start()

    def use(self, network: Network, state: ClusterState) -> dict[str, str | bytes]:
        """What ranks that are started from now on are given of other hosts; for the agent's record, where those get
        this host's weights and hear of its ranks' deaths.
        """
        self._elsewhere = replace(self._elsewhere, network=network)
        return {**self.peers.meet(state, network), "notices": self._notices.listen(network)}

    # --- ranks come ---------------------------------------------------------------------------------------------

    def start(self, keys: Collection[ProcessId], timeout_s: float, on_started: OnStarted) -> None:
        """Start ranks, all at once; `on_started` gets each of them, or its error, in a thread of ours."""
        if not self._forkserver.alive:  # its ranks went with it; the next ones need another
            self._forkserver.close()
            self._forkserver = self._new_forkserver()
        handle = self.rpc_broadcast_mq.export_handle().encode()
        unready: list[UnreadyWorkerProcHandle] = []
        try:
            for key in keys:
                launch = Launch(
                    key, self._node, self._config, self._worker_class, handle, self._elsewhere.callers, self._scale_up,
                    self.weights.handle(), self.pools.handle(), self._windows.handle(), self._elsewhere.network,
                    self._experts.handle(),
                )  # fmt: skip
                make = partial(WorkerProcParent.make_worker_process, launch, self._forkserver, self._host_lock)
                unready.append(make(self.pools.make(key)))
        except BaseException:
            for made in unready:
                made.close()
            for key in keys:
                self.pools.free(key)
            raise
        with self._lock:
            self._starting |= {handle.key: handle for handle in unready}
        self._job(f"start-{len(unready)}-ranks", partial(self._wait_for_start, unready, timeout_s, on_started))

    def _wait_for_start(self, unready: list[UnreadyWorkerProcHandle], timeout_s: float, on_started: OnStarted) -> None:
        for handle, ready in WorkerProcParent.wait_each(unready, timeout_s):
            try:
                if not isinstance(ready, Ready):
                    raise ready
                if handle.forked.cancelled():
                    raise RankDied(f"{handle.key} was given up before it was ready")
                outcome: WorkerProcHandle | ElasticError = self._join(ready, handle)
            except ElasticError as error:
                handle.close()
                outcome = error
            except Exception as error:
                if not is_shortage(error):
                    raise
                handle.close()
                outcome = NoResources(f"{handle.key}: {error}")
            if isinstance(outcome, ElasticError):
                self.pools.free(handle.key)
            with self._lock:
                self._starting.pop(handle.key, None)
            on_started(handle.key, outcome)

    def _join(self, ready: Ready, unready: UnreadyWorkerProcHandle) -> WorkerProcHandle:
        """The parent's half of the handshake: first the replies' queue, then the calls' one knows the new reader."""
        worker = WorkerProcParent.wait_for_response_handle_ready(ready, unready, self._doorbell)
        try:
            self.rpc_broadcast_mq.wait_until_ready([worker.reader], timeout_s=SEND_TIMEOUT_S)
        except ElasticError:
            send_signal(worker.child, signal.SIGKILL)
            worker.close()
            raise
        with self._lock:
            self.workers[worker.key] = worker
        try:
            worker.watcher = DeathWatcher(worker.liveness, partial(self._found_dead, worker))
        except BaseException:
            with self._lock:
                del self.workers[worker.key]
            self.rpc_broadcast_mq.drop_reader(worker.reader)
            send_signal(worker.child, signal.SIGKILL)
            worker.close()
            raise
        return worker

    def adopt(self, spare: SpareId, key: RankId, timeout_s: float, on_adopted: OnStarted) -> None:
        """Make this spare the rank `key`; `on_adopted` gets it, or the error."""
        called = self.submit("become", (key,), keys=[spare], timeout_s=timeout_s).future
        called.add_done_callback(lambda _: self._post(partial(self._adopted, spare, key, called, on_adopted)))

    def _adopted(self, spare: SpareId, key: RankId, called: Future[Outcome], on_adopted: OnStarted) -> None:
        error, worker = called.exception(timeout=0), self.workers.get(spare)
        if error is not None or worker is None or worker.dead:
            why = error or (worker.dead if worker else "it was released")
            on_adopted(key, RankError(f"{spare} could not become {key}: {why}"))
            return
        worker.key, worker.exchange_handle = key, called.result(timeout=0)[spare]
        with self._lock:
            self.workers[key] = self.workers.pop(spare)
            self.pools.rename(spare, key)
        on_adopted(key, worker)

    # --- calls --------------------------------------------------------------------------------------------------

    def submit(
        self,
        method: str | Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        keys: Collection[ProcessId] | None = None,
        output_rank: int | None = None,
        timeout_s: float = 60.0,
    ) -> PendingCall:
        """Begin a call on `keys` (default: all ranks that are not to end). Its future ends by the deadline."""
        staying = (key for key in list(self.workers) if isinstance(key, RankId) and key not in self._going)
        targets = frozenset(staying if keys is None else keys)
        name = method if isinstance(method, str) else getattr(method, "__name__", "a callable")
        failpoints.hit(f"agent.before.{name}", min(targets).slot if len(targets) == 1 else None)
        found = {key: self.workers.get(key) for key in targets}
        gone = {key: w.dead if w else "no such rank here" for key, w in found.items() if w is None or w.dead}
        number, pending = self._calls.open(name, targets, output_rank, timeout_s, time.monotonic())

        def send() -> None:
            wire = method if isinstance(method, str) else cloudpickle.dumps(method)
            arguments = cloudpickle.dumps((args, kwargs or {}))
            call = Call(number, targets, wire, arguments, output_rank, timeout_s)
            self.rpc_broadcast_mq.enqueue(call, timeout_s=min(timeout_s, SEND_TIMEOUT_S))

        return pending.begin(gone, send)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout_s: float = 60.0,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        output_rank: int | None = None,
        ranks: Collection[int] | None = None,
    ) -> list[Any]:
        """Call and wait: the results in rank order, or only `output_rank`'s. The first error of any rank is raised."""
        keys = None if ranks is None else [key for key in self.workers if key.slot in ranks]
        pending = self.submit(method, args, kwargs, keys=keys, output_rank=output_rank, timeout_s=timeout_s)
        outcome = pending.future.result(timeout=timeout_s + STOP_TIMEOUT_S)
        return [outcome[key] for key in sorted(outcome)]

    def register_failure_callback(self, callback: Callable[[Death], None]) -> None:
        """Call `callback` in the collector when a rank ends unasked."""
        self._failure_callbacks.append(callback)

    def register_exit_callback(self, callback: Callable[[int, int], None]) -> None:
        """Call `callback` with pid and status (negative: the signal) whenever a process of ours has ended."""
        self._exit_callbacks.append(callback)

    def _collect(self) -> None:
        while not self._stopping.is_set():
            self._doorbell.wait(self._anything, COLLECT_S)
            self._attempts.run(self._start_jobs, "start of a thread")
            while not self._posted.empty():
                self._attempts.once(self._posted.get_nowait(), "posted")
            for worker in list(self.workers.values()):
                self._attempts.run(partial(self._read_replies, worker), f"replies of {worker.key}")
            self._calls.expire(time.monotonic())

    def _anything(self) -> bool:
        if self._stopping.is_set() or not self._posted.empty():
            return True
        queues = (worker.worker_response_mq for worker in list(self.workers.values()))
        return any(replies is not None and replies.pending() for replies in queues)

    def _post(self, work: Callable[[], None]) -> None:
        self._posted.put(work)
        self._doorbell.ring()

    def _read_replies(self, worker: WorkerProcHandle) -> None:
        replies = worker.worker_response_mq
        if replies is None:
            return
        try:
            while (reply := replies.try_dequeue()) is not None:
                if isinstance(reply, Reply) and not self._calls.on_reply(reply):
                    log.info("late_reply_dropped", call=reply.id, rank=reply.key.slot)
        except QueueClosed:
            worker.worker_response_mq = None  # the watcher reports its death
            replies.shutdown()

    # --- ranks go -----------------------------------------------------------------------------------------------

    def _found_dead(self, worker: WorkerProcHandle, detected_by: DetectedBy) -> None:
        """In the watcher's thread. The notice goes first, as it is the more urgent; whatever becomes of it, the rank is
        buried.
        """
        try:
            if isinstance(worker.key, RankId) and worker.key not in self._going:
                self._notices.tell(worker.key)
        finally:
            self._post(partial(self._bury, worker, detected_by))

    def _bury(self, worker: WorkerProcHandle, detected_by: DetectedBy) -> None:
        if worker.dead:
            return
        self._read_replies(worker)  # its replies before its death are valid
        worker.dead = f"its process ended (detected by {detected_by})"
        self.rpc_broadcast_mq.drop_reader(worker.reader)
        self._calls.on_death(worker.key, worker.dead)
        if worker.key not in self._going:
            for callback in self._failure_callbacks:
                callback(Death(worker.key, worker.child.pid, detected_by))

    def _on_exit(self, pid: int, status: int) -> None:
        for callback in self._exit_callbacks:
            callback(pid, status)

    def retire(self, keys: Collection[ProcessId], on_ended: Callable[[ProcessId], None], *, kill: bool = False) -> None:
        """End ranks, in a thread: close the pipe, then SIGTERM, then SIGKILL (`kill`: that at once).

        A rank that died before is reported as a death, not to `on_ended`.
        """
        for key in keys:
            failpoints.hit("agent.before.retire", key.slot)
        with self._lock:
            living = [key for key in keys if key not in self.workers or not self.workers[key].has_died()]
            self._going |= set(living)
        self._job(f"retire-{len(living)}-ranks", partial(self._climb_down, living, on_ended, lambda: kill))

    def kill(self, key: ProcessId) -> None:
        """SIGKILL a rank, as a fault would: it counts as a death."""
        if (worker := self.workers.get(key)) is not None:
            send_signal(worker.child, signal.SIGKILL)

    def _climb_down(
        self, keys: list[ProcessId], on_ended: Callable[[ProcessId], None], kill: Callable[[], bool]
    ) -> None:
        """`kill`: whether to go to the last rung; asked again and again."""
        for key in keys:
            if (unready := self._starting.get(key)) is not None:
                unready.abandon()  # the waiter on its ready pipe sees its end
        left = [self.workers[key] for key in keys if key in self.workers]
        gone = [worker.key for worker in left]
        for number, grace_s in zip((0, signal.SIGTERM, signal.SIGKILL), LADDER_S, strict=True):
            if kill() and number != signal.SIGKILL:
                continue
            for worker in left:
                worker.close_death_pipe() if number == 0 else send_signal(worker.child, number)
            deadline = time.monotonic() + grace_s
            while left and time.monotonic() < deadline and (number == signal.SIGKILL or not kill()):
                left = [w for w in left if not w.ended(LOOK_S if w is left[0] else 0.0)]
        for worker in left:
            log.error("rank_does_not_end", rank=worker.key.slot, pid=worker.child.pid)
        for key in gone:
            self.forget(key)
            self._post(partial(on_ended, key))

    def drop_weights(self) -> None:
        """Forget what this host's ranks have loaded: the next ones read the checkpoint."""
        self.weights.clear()

    def forget(self, key: ProcessId) -> None:
        """Release a rank that has ended."""
        self._post(partial(self._forget, key))

    def _forget(self, key: ProcessId) -> None:
        if not self._writes_no_more(key):
            self.pools.free(key)  # it may still write: none may read it
        worker = self.workers.pop(key, None)
        self._going.discard(key)
        if worker is not None:
            worker.dead = worker.dead or "it was ended"
            self.rpc_broadcast_mq.drop_reader(worker.reader)
            self._calls.on_death(key, worker.dead)
            worker.close()

    def _writes_no_more(self, key: ProcessId) -> bool:
        """Whether this rank has certainly ended; from any thread."""
        worker = self.workers.get(key)
        return key not in self._starting if worker is None else worker.writes_no_more()

    def left_pools(self) -> set[ProcessId]:
        """Whose KV pools are kept though they have ended."""
        with self._lock:
            return set(self.pools.keys - self.workers.keys() - self._starting.keys())

    def free_pool(self, key: ProcessId) -> None:
        """Let go of one of those."""
        self.pools.free(key)

    def expert_pieces(self) -> frozenset[int]:
        """Memory of experts on this host's GPUs, by number."""
        return self._experts.numbers

    def free_expert_piece(self, number: int) -> None:
        """Let go of one."""
        self._experts.free(number)

    def _job(self, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            finally:
                self._jobs.discard(threading.current_thread())

        with self._lock:
            self._unstarted.append(threading.Thread(target=run, name=name, daemon=True))
        self._attempts.run(self._start_jobs, "start of a thread")

    def _start_jobs(self) -> None:
        """Start the threads of all jobs. What cannot be started now is started by the collector."""
        with self._lock:
            while self._unstarted:
                thread = self._unstarted[0]
                self._jobs.add(thread)
                try:
                    thread.start()
                except RuntimeError:
                    self._jobs.discard(thread)
                    raise
                self._unstarted.popleft()

    def shutdown(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """End all ranks by the ladder, by SIGKILL once `hurry`; then everything else."""
        with self._lock:
            keys = [*self.workers, *self._starting]
            self._going |= set(keys)
        self._climb_down(keys, lambda key: None, hurry)
        self._forkserver.close()
        for thread in list(self._jobs):
            thread.join(timeout=STOP_TIMEOUT_S)
        for unready in list(self._starting.values()):  # their waiter's thread could never be started
            unready.close()
        self._calls.close(RankDied("the executor was shut down"))
        self._stopping.set()
        self._doorbell.ring()
        self._collector.join(timeout=STOP_TIMEOUT_S)
        for key in list(self.workers):
            self._forget(key)
        self.rpc_broadcast_mq.shutdown()
        self.peers.close()
        self._notices.close()
        self.weights.close()
        self.pools.close()
        self._windows.close()
        self._experts.close()
        self._doorbell.close()
        os.close(self._host_lock)
