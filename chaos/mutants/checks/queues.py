"""A rank between two engines: what an engine says that it does not follow any more has no effect, nor has a zombie."""

from __future__ import annotations

from contextlib import ExitStack
from typing import cast

from chaos.mutants.checks.promise import require
from membership.base.rank_id import RankId
from workers.protocol.messages import (
    EngineMessage,
    SampledToken,
    SeqChunk,
    StepBatch,
    StepResult,
    StepStatus,
    reader_id,
)
from workers.rank.worker_api import Worker

WAIT_S = 5.0
KEY = RankId(0, 1)


class _Worker:
    """Notes which steps it was asked to run."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, int, int]] = []

    def attach_mask(self, handle: bytes) -> None:
        """It needs none."""

    def commit_epoch(self, epoch: int) -> None:
        """Whatever is asked."""

    def execute_model(self, batch: StepBatch) -> StepResult:
        self.ran.append((batch.engine_token, batch.epoch, batch.step))
        said = [SampledToken(chunk.seq, 4) for chunk in batch.ranks[0]]
        return StepResult(*KEY, batch.engine_token, batch.epoch, batch.step, 0, StepStatus.OK, said)


def older_engines() -> None:
    """Steps of an engine that was replaced, or of an epoch that is over, are not run; the rank does not go back."""
    from membership.base.errors import Fenced
    from workers.ipc.doorbell import Doorbell
    from workers.queue.message_queue import MessageQueue, MsgpackCodec
    from workers.rank.engine_port import EnginePort

    def batch(token: int, epoch: int, step: int) -> StepBatch:
        return StepBatch(token, epoch, step, 0, [], {0: [SeqChunk(1, 0, [2], [0])]})

    worker = _Worker()
    with ExitStack() as ends:
        bell = Doorbell()
        ends.callback(bell.close)
        port = EnginePort(KEY, cast(Worker, worker), bell, lambda: None)
        ends.callback(port.close)
        steps = MessageQueue("check-steps", MsgpackCodec(EngineMessage))
        ends.callback(steps.shutdown)
        handle = steps.export_handle().encode()
        port.attach(20, handle, b"")
        steps.wait_until_ready([reader_id(KEY)], timeout_s=WAIT_S)
        sent = [batch(20, 3, 1), batch(10, 3, 2), batch(20, 2, 3), batch(20, 3, 4)]
        for message in sent:
            steps.enqueue(message, WAIT_S)
        while port.pending():
            port.serve()
        require(worker.ran == [(20, 3, 1), (20, 3, 4)], f"these (engine, epoch, step) ran: {worker.ran}")
        try:
            port.attach(10, handle, b"")
        except Fenced as fenced:
            require(port.token == 20, f"it follows engine {port.token}: {fenced}")
        else:
            require(False, "a rank went back to an older engine")


def evicted() -> None:
    """An incarnation that was given up finds that out, in later epochs too; the one after it does not."""
    from workers.protocol.live_mask import LiveMask

    with LiveMask.create() as engine, LiveMask.attach(engine.handle()) as rank:
        engine.mask(3)
        engine.evict(3, 8)
        require(rank.masked() == 1 << 3, f"masked are {rank.masked():b}")
        for _ in range(2):
            require(rank.evicted(3, 8) and rank.evicted(3, 7), "a zombie does not find that it was given up")
            require(not rank.evicted(3, 9) and not rank.evicted(2, 8), "who lives takes itself for given up")
            engine.reset([1])
        require(rank.masked() == 1 << 1, f"masked are {rank.masked():b}")
