"""A rank's side of the one engine that may drive it now: its queue of steps, our answers, its live mask.

The engine is named by its token. A newer one's `attach` ends the older one's queues, whose messages have no effect from
then on. So an engine may die and be replaced while the weights stay loaded.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import structlog
from msgspec.structs import replace as replaced

from membership.base import failpoints
from membership.base.errors import CoverageLost, DeviceLost, ElasticError, Fenced, QueueClosed, QueueError, RankError
from membership.base.network import Network
from membership.base.rank_id import RankId
from membership.base.timing import STEP_ANSWER_TIMEOUT_S, STEP_OUTPUT_TIMEOUT_S
from workers.ipc.doorbell import Doorbell
from workers.protocol import step_fence
from workers.protocol.live_mask import LiveMask
from workers.protocol.messages import (
    BlocksCopied,
    CopyBlocks,
    EngineMessage,
    Farewell,
    Holding,
    Known,
    Ping,
    RankMessage,
    StepBatch,
    StepResult,
    StepStatus,
    reader_id,
)
from workers.protocol.rpc import Failure
from workers.queue.handle import Handle, this_host
from workers.queue.message_queue import MessageQueue, MsgpackCodec
from workers.queue.network import keys_for, remote_of, same_secret
from workers.rank.early_reads import EarlyReads
from workers.rank.output import OutputThread
from workers.rank.worker_api import AsyncOutput, Worker

JOIN_TIMEOUT_S = 5.0

log = structlog.get_logger(__name__)


class EnginePort:
    """All calls come from the rank's main thread. Answers to asynchronous steps and early reads leave from others."""

    def __init__(
        self,
        key: RankId | None,
        worker: Worker,
        doorbell: Doorbell,
        on_step: Callable[[], None],
        network: Network | None = None,
    ) -> None:
        """`network`: the engine may be on another host."""
        self.token = 0
        self.epoch = 0  # the last one committed here
        self._key = key
        self._worker = worker
        self._doorbell = doorbell
        self._on_step = on_step
        self._network = network
        self._own_mask: LiveMask | None = None  # of an engine on another host, as its messages say
        self._steps: MessageQueue | None = None
        self._answers: MessageQueue | None = None
        self._known: Known = {}  # what our KV blocks hold, for the next engine
        self._reported = True  # to this engine, if there is anything
        self._outputs = OutputThread("engine-outputs")
        self._reads = EarlyReads()
        self._taken: deque[EngineMessage] = deque()  # amid a step, for when it is over
        self._posted: deque[BlocksCopied] = deque()  # what targets have; other threads add to it

    @property
    def key(self) -> RankId:
        """This rank. RankError while it is a spare: no engine may use one."""
        if self._key is None:
            raise RankError("a spare has no engine")
        return self._key

    def become(self, key: RankId) -> None:
        """A spare is this rank from now on."""
        self._key = key

    def attach(
        self, token: int, broadcast_handle: bytes, mask_handle: bytes, retired: frozenset[str] = frozenset()
    ) -> bytes:
        """Join this engine's queue; an older engine gets a Farewell. Return the handle of our answers to it.

        `retired`: of the join secrets with which it must not listen; a rank has no copy of the config by itself.
        """
        if self._network is not None:
            self._network = replace(self._network, retired=retired)
        token = step_fence.follow(self.token, token)
        if token == self.token and self._answers is not None:
            return self._answers.export_handle().encode()  # asked again: the same answer
        self._answer(Farewell(*self.key, self.token, successor=token))
        self.leave()
        self.token, self._reported = token, not self._known
        self._steps, self._answers = self._open(token, broadcast_handle, mask_handle)
        return self._answers.export_handle().encode()

    def _open(self, token: int, broadcast_handle: bytes, mask_handle: bytes) -> tuple[MessageQueue, MessageQueue]:
        """The engine's steps and our answers to it."""
        handle = Handle.decode(broadcast_handle)
        near = handle.host == this_host()
        steps = MessageQueue.create_from_handle(
            handle,
            reader_id=reader_id(self.key),
            doorbell=self._doorbell,
            codec=MsgpackCodec(EngineMessage),
            timeout_s=JOIN_TIMEOUT_S,
            keys=keys_for(handle, self._network),
        )
        try:
            if near:
                self._worker.attach_mask(mask_handle)
            else:
                self._follow_mask(steps)
            name = f"rank-{self.key.rank}.{self.key.incarnation}-to-{token}"
            remote = None
            if self._network is not None and not near:  # with the secret that the engine has chosen
                remote = remote_of(same_secret(handle.remote_key, self._network))
            return steps, MessageQueue(name, codec=MsgpackCodec(RankMessage), remote=remote)
        except BaseException:
            steps.shutdown()
            raise

    def _follow_mask(self, steps: MessageQueue) -> None:
        """Keep a page of our own as the engine on another host has its page: a step looks at it while it waits."""
        self._own_mask = mask = self._new_page()
        self._worker.attach_mask(mask.handle())

        def arrived(message: EngineMessage) -> None:
            if isinstance(message, StepBatch | Ping) and step_fence.obeys(self.token, message.engine_token):
                mask.reset(message.masked)

        steps.watch(arrived)

    def _new_page(self) -> LiveMask:
        return LiveMask.create()

    def leave(self) -> None:
        """Let go of the engine's queues; another may be joined later."""
        self._reads.settle()
        self._taken.clear()
        for queue in (self._steps, self._answers):
            if queue is not None:
                queue.shutdown()
        self._steps = self._answers = None
        if self._own_mask is not None:  # the worker has mapped it, and keeps what it says
            self._own_mask.close()
            self._own_mask = None

    def close(self) -> None:
        """Leave, and stop the thread."""
        self._outputs.close()
        self.leave()
        self._reads.close()

    def pending(self) -> bool:
        """Whether `serve` would find something."""
        return bool(self._taken or self._posted) or (self._steps is not None and self._steps.pending())

    def look_ahead(self) -> None:
        """Amid a step, now and then: begin reads of dead ranks' pools that were ordered meanwhile. What else has come
        waits for the step's end, and so does what follows it, save for questions whether we live."""
        while self._steps is not None and self._steps.pending() and all(isinstance(m, Ping) for m in self._taken):
            try:
                message = self._steps.try_dequeue()
            except QueueClosed:
                return  # `serve` finds that, too, once the step is over
            if message is None:
                return
            if not step_fence.obeys(self.token, message.engine_token):
                continue
            if isinstance(message, CopyBlocks) and message.addressee != self.key:
                continue
            self._taken.append(message)  # first: it is not lost if it cannot begin, for whatever reason
            if isinstance(message, CopyBlocks) and message.there and self._begin(message):
                self._taken.pop()

    def _forget(self, order: CopyBlocks) -> None:
        """A block that is copied into holds nothing that is known."""
        if order.arriving:
            self._learn(dict.fromkeys(order.blocks, b""))

    def _begin(self, order: CopyBlocks) -> bool:
        self._forget(order)
        return self._reads.begin(lambda: self._answer(self._copied(order)))

    def serve(self) -> bool:
        """Take one message, if there is any; whether there was."""
        while self._posted:
            self._answer(self._posted.popleft())
        if self._steps is None:
            return False
        try:
            message = self._taken.popleft() if self._taken else self._steps.try_dequeue()
        except QueueClosed as closed:
            log.info("engine_gone", token=self.token, reason=str(closed))
            self.leave()
            if self._worker.evicted():
                hint = "it was stopped or hung for too long; its slot goes on as a new incarnation"
                raise Fenced(f"engine {self.token} has evicted {self.key}", hint=hint) from None
            return True
        if message is None:
            return False
        self._reads.settle()
        if step_fence.obeys(self.token, message.engine_token):
            if isinstance(message, Ping):
                self._report()
                self._answer(self._result_of_ping(message))
            elif isinstance(message, CopyBlocks):
                if message.addressee == self.key:
                    self._forget(message)
                    self._copy(message)
            else:
                self._run(message)
                self._on_step()
        return True

    def _report(self) -> None:
        """A new engine learns what our blocks hold before it uses us: its first Ping asks whether we answer."""
        if not self._reported:
            self._reported = True
            self._answer(Holding(*self.key, self.token, self._known))

    def _learn(self, known: Known) -> None:
        for block, name in known.items():
            if name:
                self._known[block] = name
            else:
                self._known.pop(block, None)

    def _run(self, batch: StepBatch) -> None:
        self._learn(batch.known.get(self.key.rank, {}))  # first: blocks that this step writes hold nothing any more
        named = self.key.rank in batch.ranks
        result = self._step(batch)
        if result is not None and not isinstance(result, StepResult):
            self._outputs.put(result, STEP_OUTPUT_TIMEOUT_S, partial(self._deliver, batch))
        elif result is not None and (named or result.status is StepStatus.OK):
            self._answer(result)

    def _step(self, batch: StepBatch) -> StepResult | AsyncOutput | None:
        try:
            if step_fence.must_commit(self.epoch, batch.epoch):
                self._worker.commit_epoch(batch.epoch)
                self.epoch = batch.epoch
        except ElasticError as error:
            return self._failed(batch, StepStatus.STALE, str(error))
        try:
            failpoints.hit("rank.step", self.key.rank)
            return self._worker.execute_model(batch)
        except CoverageLost as error:
            return self._failed(batch, StepStatus.COVERAGE_LOST, str(error))
        except DeviceLost as error:  # the last word of this process: the history then has the reason of its death
            self._answer(self._failed(batch, StepStatus.FAILED, f"{type(error).__name__}: {error}"))
            raise
        except Exception as error:  # noqa: BLE001 - a step's failure is an answer, not the end of the rank
            return self._failed(batch, StepStatus.FAILED, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")

    def _deliver(self, batch: StepBatch, value: StepResult | Failure | None) -> None:
        if isinstance(value, Failure):
            value = self._failed(batch, StepStatus.FAILED, f"{value.kind}: {value.message}")
        if value is not None:
            self._answer(value)

    def _answer(self, result: RankMessage) -> None:
        answers = self._answers
        if answers is None or not step_fence.obeys(self.token, result.engine_token):
            return
        try:
            answers.enqueue(result, timeout_s=STEP_ANSWER_TIMEOUT_S)
        except QueueError as error:  # the engine is going, or never came; it asks again if it still cares
            log.warning("answer_dropped", token=self.token, answer=type(result).__name__, reason=str(error))

    def _copy(self, order: CopyBlocks) -> None:
        """Answer once it is done. The engine orders the target's half then, so that must find the blocks."""
        done = self._copied(order)
        if order.arriving or done.error:
            return self._answer(done)
        try:
            self._worker.post_blocks(order, partial(self._posted.append, done))
        except ElasticError as error:
            self._answer(replaced(done, error=str(error)))
        while self._posted:
            self._answer(self._posted.popleft())

    def _copied(self, order: CopyBlocks) -> BlocksCopied:
        """A failure is reported: the engine leaves the request where it is, or has it computed again."""
        blocks, failed = 0, ""
        try:
            failpoints.hit("rank.copy", self.key.rank)
            blocks = self._worker.copy_blocks(order)
        except Exception as error:  # noqa: BLE001 - whatever it was, the rank serves on
            failed = f"{type(error).__name__}: {error}"
            log.warning("blocks_not_copied", copy=order.copy, arriving=order.arriving, error=failed)
        return BlocksCopied(*self.key, order.engine_token, order.copy, blocks, failed)

    def _failed(self, batch: StepBatch, status: StepStatus, error: str) -> StepResult:
        if status is StepStatus.FAILED:
            log.error("step_failed", step=batch.step, epoch=batch.epoch, error=error)
        return StepResult(*self.key, batch.engine_token, batch.epoch, batch.step, batch.attempt, status, error=error)

    def _result_of_ping(self, ping: Ping) -> StepResult:
        return StepResult(*self.key, ping.engine_token, self.epoch, ping.step, 0, StepStatus.OK)
