"""A rank between two engines, in one process: what it runs, and which engine it follows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import cast

import msgspec
import pytest

from membership.base.errors import DeviceLost, Fenced, RankError
from membership.base.rank_id import RankId
from workers.ipc.doorbell import Doorbell
from workers.protocol.messages import (
    BlocksCopied,
    CopyBlocks,
    EngineMessage,
    Holding,
    Ping,
    RankMessage,
    SampledToken,
    SeqChunk,
    StepBatch,
    StepResult,
    StepStatus,
    reader_id,
)
from workers.queue.handle import Handle
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


class ReadingWorker(NotingWorker):
    """Takes its time over each read of a pool, and looks ahead amid its steps until one has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.port: EnginePort | None = None
        self.order: list[str] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def copy_blocks(self, order: CopyBlocks) -> int:
        self.begun.set()
        assert self.go_on.wait(WAIT_S)
        self.order.append(f"read {order.copy}")
        return len(order.blocks)

    def post_blocks(self, order: CopyBlocks, then: Callable[[], None]) -> None:
        then()

    def execute_model(self, batch: StepBatch) -> StepResult:
        if batch.step == 1 and self.port is not None:
            self.port.look_ahead()
            assert self.begun.wait(WAIT_S), "it reads beside the step"
        self.order.append(f"step {batch.step}")
        self.go_on.set()
        return super().execute_model(batch)


def test_a_dead_ranks_pool_is_read_beside_a_step_and_what_follows_waits_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Ping, which an engine sends when it masks a rank, may come before it. Other messages end the looking ahead."""
    worker = ReadingWorker()
    pool = CopyBlocks(20, 1, RankId(1, 1), KEY, [5], arriving=True, there=[2])
    said: list[RankMessage] = []
    with closing(Doorbell()) as bell, closing(EnginePort(KEY, cast(Worker, worker), bell, lambda: None)) as port:
        worker.port = port
        with MessageQueue("test-steps", MsgpackCodec(EngineMessage)) as steps:
            port.attach(20, steps.export_handle().encode(), b"")
            steps.wait_until_ready([reader_id(KEY)], timeout_s=WAIT_S)
            known = {0: {5: b"five", 6: b"six"}}
            steps.enqueue(StepBatch(20, 3, 1, 0, [], {0: [SeqChunk(1, 0, [2], [0])]}, known), WAIT_S)
            other = msgspec.structs.replace(pool, target=RankId(2, 2))
            moved = CopyBlocks(20, 2, KEY, RankId(2, 2), [6])
            later = msgspec.structs.replace(pool, copy=3)
            for message in (other, Ping(20, -1), pool, moved, later):
                steps.enqueue(message, WAIT_S)
            steps.enqueue(StepBatch(20, 3, 2, 0, [], {0: [SeqChunk(1, 1, [3], [0])]}), WAIT_S)
            monkeypatch.setattr(port, "_answer", said.append)
            while port.pending():
                port.serve()
            monkeypatch.undo()
        assert held(first_words(port, 21)) == [{6: b"six"}], "what was read into holds nothing that is known"
    assert worker.order == ["step 1", "read 1", "read 2", "read 3", "step 2"]
    assert [each.copy for each in said if isinstance(each, BlocksCopied)] == [1, 2, 3]
    assert [each.step for each in said if isinstance(each, StepResult)] == [1, -1, 2]


@pytest.mark.parametrize("linked", [True, False])
def test_what_is_written_out_is_answered_once_the_target_has_it(
    monkeypatch: pytest.MonkeyPatch, worker: NotingWorker, port: EnginePort, steps: MessageQueue, *, linked: bool
) -> None:
    """Then the target finds it when it is ordered to take it in, over whichever way. Steps go on meanwhile."""
    posted: list[Callable[[], None]] = []
    said: list[RankMessage] = []

    def post(order: CopyBlocks, then: Callable[[], None]) -> None:
        if not linked:
            raise RankError("there is no link")
        posted.append(then)

    monkeypatch.setattr(worker, "copy_blocks", lambda order: len(order.blocks), raising=False)
    monkeypatch.setattr(worker, "post_blocks", post, raising=False)
    monkeypatch.setattr(port, "_answer", said.append)
    steps.enqueue(CopyBlocks(20, 1, KEY, RankId(1, 1), [5]), WAIT_S)
    steps.enqueue(StepBatch(20, 3, 1, 0, [], {0: [SeqChunk(1, 0, [2], [0])]}), WAIT_S)
    while port.pending():
        port.serve()
    if linked:
        assert [type(each) for each in said] == [StepResult]
        thread = threading.Thread(target=posted[0])
        thread.start()
        thread.join(WAIT_S)
        assert port.pending(), "so the rank's thread wakes"
        port.serve()
    (copied,) = [each for each in said if isinstance(each, BlocksCopied)]
    assert (copied.blocks, copied.error) == (1, "" if linked else "there is no link")
    assert not port.pending()


def test_an_order_whose_read_cannot_begin_for_any_reason_is_done_in_turn(
    monkeypatch: pytest.MonkeyPatch, port: EnginePort, steps: MessageQueue
) -> None:
    """Whatever went wrong amid the step is that step's failure. The engine waits for an answer to its order, too."""
    steps.enqueue(CopyBlocks(20, 1, RankId(1, 1), KEY, [5], arriving=True, there=[2]), WAIT_S)
    said: list[RankMessage] = []
    monkeypatch.setattr(port, "_answer", said.append)
    with monkeypatch.context() as broken:
        broken.setattr(port._reads, "begin", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            port.look_ahead()
    while port.pending():
        port.serve()
    assert [each.copy for each in said if isinstance(each, BlocksCopied)] == [1]


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


@pytest.mark.parametrize(("ranks", "said"), [({0: []}, 1), ({}, 0)], ids=["named", "not named"])
def test_a_rank_without_requests_says_that_a_step_failed_if_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
    worker: NotingWorker,
    port: EnginePort,
    steps: MessageQueue,
    ranks: dict[int, list[SeqChunk]],
    said: int,
) -> None:
    """The engine waits for all that are named; of the others it expects nothing."""
    answers: list[RankMessage] = []
    monkeypatch.setattr(port, "_answer", answers.append)
    monkeypatch.setattr(worker, "commit_epoch", lambda epoch: (_ for _ in ()).throw(Fenced("not prepared")))
    steps.enqueue(StepBatch(20, 3, 1, 0, [], ranks, together=5), WAIT_S)
    while port.pending():
        port.serve()
    assert [cast(StepResult, each).status for each in answers] == [StepStatus.STALE] * said


def test_a_lost_device_is_the_last_answer_of_its_rank(
    monkeypatch: pytest.MonkeyPatch, worker: NotingWorker, port: EnginePort, steps: MessageQueue
) -> None:
    """The engine then knows why it died; steps that wait are not begun."""
    answers: list[RankMessage] = []
    monkeypatch.setattr(port, "_answer", answers.append)
    failing: list[StepBatch] = []

    def fails(batch: StepBatch) -> StepResult:
        failing.append(batch)
        raise DeviceLost("cuda:0: unspecified launch failure")

    monkeypatch.setattr(worker, "execute_model", fails)
    for step in (1, 2):
        steps.enqueue(StepBatch(20, 3, step, 0, [], {0: [SeqChunk(1, 0, [2], [0])]}), WAIT_S)
    with pytest.raises(DeviceLost):
        port.serve()
    assert [batch.step for batch in failing] == [1]
    (said,) = (each for each in answers if isinstance(each, StepResult))
    assert (said.status, said.error) == (StepStatus.FAILED, "DeviceLost: cuda:0: unspecified launch failure")


def test_a_rank_never_goes_back_to_an_older_engine(port: EnginePort, steps: MessageQueue) -> None:
    with pytest.raises(Fenced, match="engine token 10 is older than 20"):
        port.attach(10, steps.export_handle().encode(), b"")
    assert port.token == 20


def first_words(port: EnginePort, token: int) -> list[RankMessage]:
    """What the rank says to a new engine that asks whether it answers."""
    steps = MessageQueue("test-steps", MsgpackCodec(EngineMessage))
    handle = Handle.decode(port.attach(token, steps.export_handle().encode(), b""))
    with closing(Doorbell()) as bell:
        codec = MsgpackCodec(RankMessage)
        with MessageQueue.create_from_handle(handle, f"engine-{token}", bell, WAIT_S, codec) as answers:
            steps.wait_until_ready([reader_id(KEY)], timeout_s=WAIT_S)
            for number in (-1, -2):
                steps.enqueue(Ping(token, number), WAIT_S)
            while port.pending():
                port.serve()
            said = []
            while answers.pending():
                said.append(answers.dequeue(timeout_s=WAIT_S))
    steps.shutdown()
    return said


def held(said: list[RankMessage]) -> list[dict[int, bytes]]:
    return [message.known for message in said if isinstance(message, Holding)]


def test_a_new_engine_learns_first_and_once_what_is_known_of_the_blocks(port: EnginePort, steps: MessageQueue) -> None:
    chunks = {0: [SeqChunk(1, 0, [2], [0])]}
    told: list[dict[int, dict[int, bytes]]] = [{0: {3: b"c", 4: b"d", 5: b"e"}, 1: {9: b"x"}}, {0: {4: b"", 6: b"f"}}]
    for number, known in enumerate(told):
        steps.enqueue(StepBatch(20, 3, number, 0, [], chunks, known), WAIT_S)
    steps.enqueue(CopyBlocks(20, 1, RankId(1, 1), KEY, [5], arriving=True), WAIT_S)
    while port.pending():
        port.serve()
    said = first_words(port, 21)
    assert isinstance(said[0], Holding), "before the answer by which it is used"
    assert held(said) == [{3: b"c", 6: b"f"}]
    assert held(first_words(port, 22)) == [{3: b"c", 6: b"f"}], "the second engine has said nothing else"


def test_a_rank_that_was_told_nothing_says_nothing(port: EnginePort) -> None:
    assert held(first_words(port, 20)) == []
