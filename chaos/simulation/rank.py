"""A simulated rank process: the shipped worker and engine port, in a main loop that does one thing at a time.

Calls of its agent and messages of its engine are served one at a time; a step waits for peers that do not answer. It
may be stopped, hang in native code, be slow, or die at any moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

from chaos.simulation.exchange import Bank, Runner, SimExchange, SimMask
from chaos.simulation.gpus import ASK_AGAIN_S, RUN_ON_S, Kernels, SimGpuExchange
from chaos.simulation.invariants import Violation, require
from chaos.simulation.network import Stream
from chaos.simulation.process import Process
from chaos.simulation.silence import Watch
from membership.base import failpoints
from membership.base.errors import CoverageLost, ElasticError, Fenced, QueueClosed, QueueSilent, WaitTimeout
from membership.base.rank_id import RankId
from membership.planning.identity import KERNELS
from membership.store.records import View
from workers.exchange.model_side import StepContext
from workers.fleet.watchdog import Look
from workers.protocol.device_note import NOTHING, DeviceNote
from workers.protocol.identity import Identity
from workers.protocol.live_mask import LiveMask
from workers.protocol.liveness import NUMBERS_PER_S
from workers.protocol.load_progress import LoadSeen
from workers.protocol.messages import CopyBlocks, StepBatch
from workers.protocol.step_fence import FENCED_STATUS
from workers.queue.silence import OtherHosts
from workers.rank.device_health import DeviceHealth
from workers.rank.engine_port import JOIN_TIMEOUT_S, EnginePort
from workers.rank.load_turns import LoadTurns
from workers.rank.preparation import Preparation, experts_of
from workers.rank.worker import EPWorker
from workers.rank.worker_api import WorkerContext

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster
    from chaos.simulation.host import Host

BEAT_S, TURN_S, RETRY_S = 0.1, 0.4, 0.03
TOOK_S = {"initialise": (0.05, 0.3), "prepare_epoch": (0.05, 0.3)}
STEP_S, LAUNCH_S = (0.01, 0.05), (0.0005, 0.002)
Reply = Callable[[Any, str], None]


class SimPreparation:
    """A view that is being prepared."""

    def __init__(self, view: View) -> None:
        self.view, self.ready, self.running, self.stopped = view, False, True, False

    def stop(self) -> None:
        self.stopped, self.ready, self.running = True, False, False


class _NoTurns(LoadTurns):
    """Nothing is reported: when it is due, the clock of this machine would say."""

    def due(self, now: float, rank: int, ranks: int) -> bool:
        return False


class SimWorker(EPWorker):
    """The shipped worker around a model, experts and links that are only names."""

    def __init__(self, rank: RankProcess) -> None:
        slot, incarnation = rank.key
        self._ctx = WorkerContext(
            slot, incarnation, rank.host.node, rank.cluster.config, cast(Any, None), {}, nullcontext()
        )
        self.rank = rank.key[0]
        self._process = rank
        self.names = Bank()
        self.bank = cast(Any, self.names)
        self.exchange = cast(Any, rank.exchange)
        self.runner = Runner(rank)
        self._runner = cast(Any, self.runner)
        self._device = self._backend = self._latest = self._mask = None
        self.gpu = SimGpuExchange(self._ctx, rank) if self._ctx.config.gpu_exchange else None
        self._gpu_exchange = self.gpu
        self._load_turns, self._health = _NoTurns(), DeviceHealth()
        self._view, self._preparing, self._engine_token, self._left = View(epoch=0), {}, 0, set()

    def attach_mask(self, handle: bytes) -> None:
        self._mask = self._process.cluster.masks[handle]

    def prepare_epoch(self, view: View, peers: dict[int, tuple[int, bytes]]) -> Preparation:
        """As shipped, without the thread."""
        for epoch, preparation in list(self._preparing.items()):
            if preparation.running:
                preparation.stop()
            if not preparation.ready or epoch == view.epoch:
                del self._preparing[epoch]
        made = cast(Preparation, SimPreparation(view))
        self._preparing[view.epoch] = self._latest = made
        return made

    def copy_blocks(self, order: CopyBlocks) -> int:
        """Two blocks at a time, as if the host had no room for more."""
        try:
            if order.there:
                lives = order.source in self._process.cluster.ranks
                require(not lives, f"a KV pool is read while its {order.source} may still write")
                self._process.host.executor.check_pool(order.source)
            return self._process.cluster.kv.copy(order, piece=2).blocks
        except Violation as violation:  # the caller takes any error for the copy's
            self._process.cluster.report(violation)
            raise

    def post_blocks(self, order: CopyBlocks, then: Callable[[], None]) -> None:
        """What was copied is there, if its way is open."""
        if self._process.exchange.reaches(order.target):
            then()

    def execute_model(self, batch: StepBatch) -> Any:
        self.runner.batch = batch
        return super().execute_model(batch)


class Inbox:
    """The rank's end of an engine's queue of steps."""

    def __init__(self, rank: RankProcess, engine: Process) -> None:
        self.messages: deque[Any] = deque()
        self.closed = ""
        self._rank, self._far = rank, rank.at != engine.at
        self._stream = Stream(rank.cluster.network, rank.clock, engine.at, rank.at)
        self._on_arrival: Callable[[Any], None] = lambda message: None
        self._silence = Watch(rank, engine.at, lambda silent_s: self._close("its writer is silent"), soon=False)

    def deliver(self, message: Any, delay_s: float) -> None:
        """Messages arrive in order, each after its delay."""
        self._stream.send(delay_s, self._put, message)

    def _put(self, message: Any) -> None:
        if not self.closed:
            self._on_arrival(message)
            self.messages.append(message)
            self._rank.wake(0.0)

    def watch(self, on_arrival: Callable[[Any], None]) -> None:
        """See MessageQueue."""
        self._on_arrival = on_arrival
        for message in self.messages:
            on_arrival(message)

    def close(self, why: str) -> None:
        """The engine is gone, or has dropped this rank."""
        if self._far:
            self._stream.finish(0.001, self._close, why)
        else:
            self._close(why)

    def _close(self, why: str) -> None:
        self._silence.stop()
        self.closed = why
        self._rank.wake(0.001)

    def pending(self) -> bool:
        """Whether there is a message, or the end."""
        return bool(self.messages or self.closed)

    def try_dequeue(self) -> Any:
        if self.closed:
            raise QueueClosed(self.closed)
        return self.messages.popleft() if self.messages else None

    def shutdown(self) -> None:
        self._silence.stop()
        self.closed = "left"


class Outbox:
    """The rank's answers to one engine."""

    def __init__(self, rank: RankProcess, name: bytes, to: str) -> None:
        """`to`: the host of that engine."""
        self.name, self.rank, self.to = name, rank, to
        self.items: deque[Any] = deque()
        self.ring: Callable[[], None] = lambda: None
        self.left = False
        self.ended = False  # the end has reached the engine
        self._silent_s = 0.0  # as the engine finds it
        self.watch: Watch | None = None  # of an engine on another host
        self._stream = Stream(rank.cluster.network, rank.clock, rank.at, to)

    def enqueue(self, message: Any, timeout_s: float) -> None:
        """Delivered even if the rank dies on the way."""
        self._stream.send(self.rank.cluster.delay(), self._put, message)

    def _put(self, message: Any) -> None:
        self.items.append(message)
        self.ring()

    def export_handle(self) -> Outbox:
        """See workers/queue/message_queue.py: it is also its own handle."""
        return self

    def encode(self) -> bytes:
        return self.name

    def pending(self) -> bool:
        """Whether there is a message, or the end."""
        return bool(self.items) or self.ended or self._silent_s > 0

    def try_dequeue(self) -> Any:
        if not self.items and self._silent_s:
            silent = QueueSilent("its host is silent")
            silent.silent_s = self._silent_s
            raise silent
        if not self.items and self.ended:
            raise QueueClosed("the rank has left")
        return self.items.popleft() if self.items else None

    def end_on_silence(self, engine: Process, others: OtherHosts) -> Watch:
        """See MessageQueue. The caller stops it."""
        self.watch = Watch(engine, self.rank.at, self._is_silent, others)
        return self.watch

    def _is_silent(self, silent_s: float) -> None:
        self._silent_s = silent_s
        self.ring()

    def shutdown(self) -> None:
        """The rank leaves. What it has sent arrives before its end does."""
        self.left = True
        far = self.to != self.rank.at  # its end is looked for there: its agent's word comes first
        self._stream.finish(3 * self.rank.cluster.delay() if far else 0.0, self._end)

    def _end(self) -> None:
        self.ended = True
        self.ring()


class Port(EnginePort):
    """As shipped, on simulated queues."""

    def __init__(self, rank: RankProcess) -> None:
        super().__init__(rank.key, rank.worker, cast(Any, None), lambda: None)
        self._process = rank

    def _open(self, token: int, broadcast_handle: bytes, mask_handle: bytes) -> tuple[Any, Any]:
        cluster = self._process.cluster
        if broadcast_handle not in cluster.broadcasts:
            raise QueueClosed(f"engine {token} is gone")
        steps, me = cluster.broadcasts[broadcast_handle], self._process
        if not cluster.network.connected(me.at, steps.at):
            raise WaitTimeout(f"engine {token} did not admit us")
        if steps.at == me.at:
            self._worker.attach_mask(mask_handle)
        answers = Outbox(me, b"%d.%d-to-%d" % (*self.key, token), steps.at)
        cluster.outboxes[answers.name] = answers
        inbox = steps.join(me)
        if steps.at != me.at:
            self._follow_mask(cast(Any, inbox))
        return inbox, answers

    def _new_page(self) -> LiveMask:
        page = SimMask(b"mask-of-%d.%d-%d" % (*self.key, self.token))
        self._process.cluster.masks[page.name] = page
        return page

    @property
    def head(self) -> Any:
        """The next message, which stays in the queue."""
        inbox = cast(Inbox, self._steps)
        return inbox.messages[0] if self._steps is not None and inbox.messages and not inbox.closed else None


class RankProcess(Process):
    """One incarnation of a rank, which is also its own liveness page."""

    def __init__(self, cluster: Cluster, key: RankId, host: Host) -> None:
        super().__init__(cluster, f"rank {key[0]}.{key[1]}", host.at)
        self.key, self.host, self.pid = key, host, cluster.next_pid()
        self.born, self.steps, self.slow, self.hang = self.clock.now, 0, 1.0, ""
        self.windows = host.executor.windows
        self.kernels: Kernels | None = None  # what it has launched last
        self.called_off = 0  # as its liveness page says
        self.runs_on_s, self._over_at = RUN_ON_S, 0.0  # of kernels after its death
        self.exchange = SimExchange(self)
        self.worker = SimWorker(self)
        self.port = Port(self)
        self.status = 0
        self._calls: deque[tuple[str, tuple[Any, ...], Reply]] = deque()
        self._busy = self._waits = False
        self._served = self._marks = 0
        self._paused_at, self._paused_s = 0.0, 0.0

    # --- its liveness page

    @property
    def _ran_s(self) -> float:
        paused_s = self._paused_s + (self.clock.now - self._paused_at if self.stopped else 0.0)
        return self.clock.now - self.born - paused_s

    @property
    def heartbeats(self) -> int:
        return int((self.clock.now - self.born if self.hang == "native" else self._ran_s) / BEAT_S)

    @property
    def turns(self) -> int:
        return 1 + self._served + int(self._ran_s / TURN_S)

    @property
    def waited_s(self) -> float:
        return self._ran_s / 2

    @property
    def load(self) -> LoadSeen:
        """It loads nothing, but each call that begins or ends is progress."""
        return LoadSeen(False, 0, 0, self._marks)

    @property
    def note(self) -> DeviceNote:
        """Nothing: it has no device."""
        return NOTHING

    def call_off(self, below: int) -> None:
        """See `LivenessPage`. Its kernels look there."""
        self.called_off = max(below, self.called_off)
        if self.kernels is not None:
            self.kernels.look()

    def call_off_before(self, now: float) -> None:
        """See `LivenessPage`."""
        self.call_off(int(now * NUMBERS_PER_S))

    def look(self) -> Look:
        """What /proc and the liveness page show now."""
        computes = self._busy and not self._waits and not self.stopped
        state = "S" if self.hang else "T" if self.stopped else "R" if computes else "S"
        return Look(state, self._ran_s if computes else 0.0, False, 0.0, self.heartbeats, self.steps, self.turns)

    @property
    def ended(self) -> bool:
        return not self.alive

    @property
    def runs_on_for_s(self) -> float:
        """For how long its process is not over though its main thread has ended."""
        return max(0.0, self._over_at - self.clock.now)

    @property
    def over(self) -> bool:
        """Whether its process has ended, as a pidfd says, and with it all that it had launched."""
        return not self.alive and not self.runs_on_for_s

    # --- what is done to it

    @property
    def busy(self) -> bool:
        return self._busy

    def stop(self, hang: str = "") -> None:
        """SIGSTOP, or a native hang: `native` without the interpreter's lock, `gil` with it."""
        if self.alive and not self.stopped:
            super().stop()
            self.hang, self._paused_at = hang, self.clock.now

    def resume(self) -> None:
        if self.stopped:
            self._paused_s += self.clock.now - self._paused_at
            self.hang = ""
            super().resume()
            if self.alive and not self.host.alive:
                self.die()  # it reads its death pipe

    def die(self, status: int = -9) -> None:
        """Its process ends; the kernel notifies agent and engines."""
        if self.alive:
            super().die()
            self.status = status
            if self.kernels is not None and not self.kernels.ended:
                self._over_at = self.clock.now + self.runs_on_s
            self.port.leave()
            self.cluster.rank_died(self)

    def call(self, method: str, args: tuple[Any, ...], reply: Reply) -> None:
        self._calls.append((method, args, reply))
        self.wake(0.0)

    # --- its main loop

    def turn(self) -> None:
        """Serve calls and messages one after another, until one takes time."""
        while self.alive and not self._busy:
            if self._calls:
                self._begin_call(*self._calls.popleft())
            elif (message := self.port.head) is not None and isinstance(message, StepBatch) and self._mine(message):
                self._busy = True
                took_s = self.random.uniform(*(LAUNCH_S if message.together else STEP_S))
                self.after(took_s * self.slow, self._step)
            elif not self._serve():
                return

    def _mine(self, batch: StepBatch) -> bool:
        named = self.key[0] in batch.ranks if batch.together else bool(batch.ranks.get(self.key[0]))
        return named and batch.engine_token == self.port.token

    def _serve(self) -> bool:
        self._served += 1
        try:
            return self.port.serve()
        except Fenced:
            self.die(FENCED_STATUS)
            return False

    def _step(self) -> None:
        """End the step, unless a peer or its own kernels keep it waiting."""
        batch = self.port.head
        mine = batch if isinstance(batch, StepBatch) and self._mine(batch) else None
        if mine is not None and mine.together:
            self._waits = self._launched(mine)
            if self._waits:
                return
        self._waits = mine is not None and not mine.together and self._kept_waiting(mine)
        if self._waits:
            self.after(RETRY_S, self._step)
            return
        self._busy = False
        if self.port.pending():
            self._serve()
            self.steps += 1
        self.turn()

    def go_on(self) -> None:
        """Its kernels have ended."""
        if self._busy and self._waits:
            self._step()

    def _launched(self, batch: StepBatch) -> bool:
        """Whether its kernels run, maybe from now on."""
        if self.kernels is not None and (not self.kernels.ended or self.kernels.batch is batch):
            return not self.kernels.ended
        if self.worker.gpu is None or self.worker._refuse(batch):
            return False
        self.kernels = self.worker.gpu.launch(self.worker._view, batch)
        return self.kernels is not None

    def _kept_waiting(self, batch: StepBatch) -> bool:
        """Whether a peer that must answer for rows is stopped."""
        found = self.worker._preparing.get(batch.epoch)
        view = self.worker._view if self.worker._view.epoch == batch.epoch else found.view if found else None
        if view is None or self.worker._refuse(batch):
            return False
        ctx = StepContext(view, batch.engine_token, batch.step, batch.attempt, sum(1 << r for r in set(batch.masked)))
        try:
            asked = self.exchange.asked(ctx, batch.ranks[self.key[0]])
        except CoverageLost:
            return False
        peers = {RankId(parcel.rank, ctx.incarnations[parcel.rank]) for _, parcel in asked} - {self.key}
        return any(self.exchange.keeps_waiting(peer) for peer in peers)

    def _begin_call(self, method: str, args: tuple[Any, ...], reply: Reply) -> None:
        self._marks += 1
        low, high = TOOK_S.get(method, (0.001, 0.01))
        took_s = self.random.uniform(low, high) * self.slow
        if method == "attach_engine" and self._cannot_join(args[1]):
            took_s = JOIN_TIMEOUT_S
        if method == "prepare_epoch":  # in the background: the rank goes on
            made = self.worker.prepare_epoch(*args)
            limit = self.clock.now + self.cluster.config.launch_deadline_s
            self.after(took_s, self._prepared, made, args, reply, limit)
            return
        self._busy = True
        self.after(took_s, self._end_call, method, args, reply)

    def _end_call(self, method: str, args: tuple[Any, ...], reply: Reply) -> None:
        self._busy = False
        try:
            value = self._called(method, args)
        except ElasticError as error:
            reply(None, str(error))
        else:
            reply(value, "")
        self.turn()

    def _cannot_join(self, broadcast_handle: bytes) -> bool:
        steps = self.cluster.broadcasts.get(broadcast_handle)
        return steps is not None and not self.cluster.network.connected(self.at, steps.at)

    def _called(self, method: str, args: tuple[Any, ...]) -> Any:
        if method == "attach_engine":
            return self.port.attach(*args)
        if method == "retire_epoch":
            return self.worker.retire_epoch(*args)
        return Identity({KERNELS: "kernel"})

    def _prepared(self, made: Preparation, args: tuple[Any, ...], reply: Reply, limit: float) -> None:
        """Experts are loaded. Links to all peers take as long as the peers do."""
        view, peers = args
        try:
            failpoints.hit("rank.before.prepare", self.key[0])
        except failpoints.FaultInjected as error:
            cast(Any, made).running = False
            reply(None, str(error))
            return
        if cast(Any, made).stopped:
            reply(None, f"epoch {view.epoch} was replaced")
            return
        if self.key[0] in self.cluster.bad:
            cast(Any, made).running = False
            reply(None, "no memory")
            return
        others = {RankId(rank, incarnation) for rank, (incarnation, _) in peers.items()} - {self.key}
        reached = {peer for peer in others if self.exchange.reaches(peer)}
        if reached == others and self.worker.gpu is not None and not self.worker.gpu.opened():
            self.after(ASK_AGAIN_S, self._prepared, made, args, reply, limit)
        elif reached == others:
            for peer in sorted(others):
                self.exchange.link(peer)
            self.worker.names.held |= experts_of(view, self.key[0])
            cast(Any, made).ready, cast(Any, made).running = True, False
            reply({}, "")
        elif self.clock.now >= limit:
            cast(Any, made).running = False
            reply(None, f"no link to {sorted(others - reached)}")
        else:
            self.after(0.2, self._prepared, made, args, reply, limit)
