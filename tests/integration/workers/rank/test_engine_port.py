"""A rank and its engines: joining, stepping, and being driven by one engine after another without loading again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from membership.base.errors import QueueClosed, RankFailed
from membership.base.rank_id import RankId
from membership.store.records import View
from tests.support.executors import executor, launch
from workers.agent.executor import MultiprocExecutor
from workers.protocol.messages import (
    BlocksCopied,
    CopyBlocks,
    EngineMessage,
    Farewell,
    Ping,
    RankMessage,
    SeqChunk,
    StepBatch,
    StepResult,
    StepStatus,
    reader_id,
)
from workers.queue.message_queue import MessageQueue, MsgpackCodec

pytestmark = pytest.mark.integration

KEY = RankId(0, 1)


class Engine:
    """An engine's queues, and nothing more."""

    def __init__(self, made: MultiprocExecutor, token: int) -> None:
        self.token = token
        self.steps = MessageQueue(f"steps-{token}", codec=MsgpackCodec(EngineMessage))
        self.handle = attach(made, self)
        self.answers = MessageQueue.create_from_handle(self.handle, f"engine-{token}", codec=MsgpackCodec(RankMessage))

    def step(self, number: int, tokens: list[int], epoch: int = 1, rank: int = 0) -> None:
        chunks = {rank: [SeqChunk(seq=5, start=0, tokens=tokens, blocks=[])]}
        self.steps.enqueue(StepBatch(self.token, epoch, number, 0, [], chunks))

    def answer(self) -> StepResult:
        result = self.answers.dequeue(timeout_s=30)
        assert isinstance(result, StepResult)
        return result

    def silent(self) -> bool:
        """Whether the rank says nothing to what was asked before: it answers a later ping first."""
        self.steps.enqueue(Ping(self.token, 99))
        return self.answer().step == 99

    def close(self) -> None:
        self.steps.shutdown()
        self.answers.shutdown()


def attach(made: MultiprocExecutor, engine: Engine) -> bytes:
    """As the agent does when it sees the engine's record."""
    args = (engine.token, engine.steps.export_handle().encode(), b"mask-%d" % engine.token)
    handle = made.submit("attach_engine", args, keys=[KEY], timeout_s=30).future.result(timeout=30)[KEY]
    assert isinstance(handle, bytes)
    return handle


@pytest.fixture
def made() -> Iterator[MultiprocExecutor]:
    made = executor()
    launch(made, [KEY], 30)
    made.collective_rpc("initialise", 30)
    made.collective_rpc("prepare_epoch", 30, (View(epoch=1), {}))
    yield made
    made.shutdown()


@contextmanager
def engine(made: MultiprocExecutor, token: int) -> Iterator[Engine]:
    with ExitStack() as stack:
        found = Engine(made, token)
        stack.callback(found.close)
        yield found


def test_steps_and_pings_are_answered(made: MultiprocExecutor) -> None:
    with engine(made, 7) as first:
        assert first.steps.readers == (reader_id(KEY),)
        first.steps.enqueue(Ping(7, 3))
        assert first.answer() == StepResult(0, 1, 7, 0, 3, 0, StepStatus.OK)
        first.step(4, [1, 2])
        result = first.answer()
        assert (result.step, result.epoch, result.status, result.tokens[0].token) == (4, 1, StepStatus.OK, 3)
        first.step(5, [15])
        assert first.answer().tokens[0].token == 15, "an output made in the background"
    assert made.collective_rpc("all_calls", 30) == [["init_device", "load_model", "prepare-1", "commit-1"]]


def test_failures_of_a_step_are_answers(made: MultiprocExecutor) -> None:
    with engine(made, 7) as first:
        for tokens, status, error in (
            ([13], StepStatus.COVERAGE_LOST, "expert 13 has no owner"),
            ([14], StepStatus.FAILED, "ValueError: bad chunk"),
        ):
            first.step(1, tokens)
            result = first.answer()
            assert result.status is status
            assert error in result.error
        first.step(2, [1], epoch=9)
        assert first.answer().status is StepStatus.STALE, "not prepared"
        first.step(3, [1], epoch=0)
        assert first.answer().status is StepStatus.STALE, "epoch 1 is committed"
        first.step(4, [1], rank=8)
        assert first.silent(), "only ranks with chunks answer"
        first.step(5, [2, 3])
        assert first.answer().tokens[0].token == 5, "the rank serves on"


def test_a_new_engine_takes_over_without_loading_and_the_old_one_has_no_effect(made: MultiprocExecutor) -> None:
    with engine(made, 7) as first:
        first.step(1, [1])
        first.answer()
        with engine(made, 8) as second:
            first.step(2, [1])
            assert first.answers.dequeue(timeout_s=30) == Farewell(*KEY, 7, successor=8)
            with pytest.raises(QueueClosed):
                first.answers.dequeue(timeout_s=30)
            assert first.steps.drop_reader(reader_id(KEY)) is False, "it left the older queue"
            second.step(1, [2])
            assert second.answer().engine_token == 8
            with pytest.raises(RankFailed, match="Fenced: engine token 7 is older than 8"):
                attach(made, first)
    assert made.collective_rpc("all_calls", 30) == [["init_device", "load_model", "prepare-1", "commit-1"]]
    assert made.collective_rpc(lambda worker: worker.mask, 30) == [b"mask-8"]


def test_a_message_of_an_older_token_on_the_new_queue_has_no_effect(made: MultiprocExecutor) -> None:
    with engine(made, 8) as current:
        current.steps.enqueue(StepBatch(7, 1, 1, 0, [], {0: [SeqChunk(seq=5, start=0, tokens=[1], blocks=[])]}))
        assert current.silent()


def test_attaching_twice_to_one_engine_gives_the_same_answer(made: MultiprocExecutor) -> None:
    with engine(made, 7) as first:
        assert attach(made, first) == first.handle
        assert first.silent()


def test_an_engine_that_died_costs_the_rank_nothing(made: MultiprocExecutor) -> None:
    with engine(made, 7) as first:
        first.step(1, [1])
        first.answer()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and made.collective_rpc("echo", 30, (1,)) != [(0, 1)]:
        pass
    with pytest.raises(RankFailed, match="no such resource here"):
        made.submit("attach_engine", (8, first.steps.export_handle().encode(), b""), timeout_s=30).future.result(30)
    with engine(made, 9) as second:
        second.step(1, [4])
        assert second.answer().tokens[0].token == 4


def test_blocks_are_copied_by_whose_turn_it_is(made: MultiprocExecutor) -> None:
    other = RankId(1, 2)
    with engine(made, 7) as first:
        for order in (
            CopyBlocks(7, 1, other, KEY, [3, 4]),
            CopyBlocks(7, 2, KEY, other, [3, 4], arriving=True),
            CopyBlocks(6, 3, KEY, other, [3, 4]),
            CopyBlocks(7, 4, KEY, other, [3, 4]),
            CopyBlocks(7, 5, other, KEY, [13], arriving=True),
        ):
            first.steps.enqueue(order)
        assert first.answers.dequeue(timeout_s=30) == BlocksCopied(*KEY, 7, 4, 2)
        error = "ValueError: block 13 cannot be copied"
        assert first.answers.dequeue(timeout_s=30) == BlocksCopied(*KEY, 7, 5, 0, error)
        assert first.silent()
