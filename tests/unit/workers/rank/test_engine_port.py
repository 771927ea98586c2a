"""A rank between two engines, in one process: what it runs, and which engine it follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import cast

import pytest

from membership.base.errors import Fenced
from membership.base.rank_id import RankId
from workers.ipc.doorbell import Doorbell
from workers.protocol.messages import (
    EngineMessage,
    SampledToken,
    SeqChunk,
    StepBatch,
    StepResult,
    StepStatus,
    reader_id,
)
from workers.queue.message_queue import MessageQueue, MsgpackCodec
from workers.rank.engine_port import EnginePort
from workers.rank.worker_api import Worker

pytestmark = pytest.mark.unit

WAIT_S = 5.0
KEY = RankId(0, 1)


class NotingWorker:
    """Notes which steps it was asked to run: (engine token, epoch, step)."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, int, int]] = []

    def attach_mask(self, handle: bytes) -> None:
        """It needs none."""

    def commit_epoch(self, epoch: int) -> None:
        """Any epoch is fine."""

    def execute_model(self, batch: StepBatch) -> StepResult:
        self.ran.append((batch.engine_token, batch.epoch, batch.step))
        sampled = [SampledToken(chunk.seq, 4) for chunk in batch.ranks[0]]
        return StepResult(*KEY, batch.engine_token, batch.epoch, batch.step, 0, StepStatus.OK, sampled)


@pytest.fixture
def worker() -> NotingWorker:
    return NotingWorker()


@pytest.fixture
def port(worker: NotingWorker) -> Iterator[EnginePort]:
    with closing(Doorbell()) as bell, closing(EnginePort(KEY, cast(Worker, worker), bell, lambda: None)) as port:
        yield port


@pytest.fixture
def steps(port: EnginePort) -> Iterator[MessageQueue]:
    """The queue of engine 20, which the rank has joined."""
    steps = MessageQueue("test-steps", MsgpackCodec(EngineMessage))
    port.attach(20, steps.export_handle().encode(), b"")
    steps.wait_until_ready([reader_id(KEY)], timeout_s=WAIT_S)
    yield steps
    steps.shutdown()


def test_steps_of_another_engine_or_an_older_epoch_are_not_run(
    worker: NotingWorker, port: EnginePort, steps: MessageQueue
) -> None:
    for token, epoch, step in ((20, 3, 1), (10, 3, 2), (20, 2, 3), (20, 3, 4)):
        steps.enqueue(StepBatch(token, epoch, step, 0, [], {0: [SeqChunk(1, 0, [2], [0])]}), WAIT_S)
    while port.pending():
        port.serve()
    assert worker.ran == [(20, 3, 1), (20, 3, 4)]


def test_a_rank_never_goes_back_to_an_older_engine(port: EnginePort, steps: MessageQueue) -> None:
    with pytest.raises(Fenced, match="engine token 10 is older than 20"):
        port.attach(10, steps.export_handle().encode(), b"")
    assert port.token == 20
