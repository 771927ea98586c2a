"""EPWorker by itself: epochs prepared in the background, flipped at step boundaries, retired; errors as statuses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from torch import Tensor

from membership.base.errors import (
    ConfigError,
    DeviceFull,
    DeviceLost,
    Fenced,
    OutOfDeviceMemory,
    PeerTimeout,
    WaitTimeout,
)
from membership.base.rank_id import RankId
from membership.store.records import ClusterConfig, Member, Placement, View
from tests.support.families import write_checkpoint
from tests.support.local_exchange import LocalExchange
from workers.agent.weight_store import WeightStore
from workers.exchange.loop import Exchange
from workers.exchange.model_side import StepContext
from workers.exchange.transports import opener
from workers.ipc.doorbell import Doorbell
from workers.model.shared_weights import SharedWeights
from workers.protocol.messages import CopyBlocks, Sampling, SeqChunk, StepBatch, StepStatus, TracedResult, TracedStep
from workers.rank.worker import EPWorker
from workers.rank.worker_api import Worker, WorkerContext

pytestmark = pytest.mark.integration

ALL = tuple(range(8))
WHOLE: Placement = {0: (ALL, ALL)}
HALF: Placement = {0: ((0, 1, 2, 3), (0, 1, 2, 3)), 1: ((4, 5, 6, 7), (4, 5, 6, 7))}


class ScriptedExchange(Exchange):
    """Computes with the experts of this rank alone, and links with peers when the test lets it."""

    def __init__(self, worker: EPWorker, doorbell: Doorbell) -> None:
        super().__init__(RankId(worker.rank, 1), worker.bank, doorbell, opener("loopback"))
        self.local = LocalExchange(worker.bank)
        self.connected: list[dict[RankId, bytes]] = []
        self.gone: set[RankId] = set()
        self.hold = threading.Event()
        self.hold.set()
        self.fail: Exception | None = None
        self.steps: list[StepContext] = []

    def connect(
        self, peers: Mapping[RankId, bytes], timeout_s: float, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        if not self.hold.wait(timeout_s):
            raise PeerTimeout("peers did not answer")
        if given_up():
            raise Fenced("these peers are no longer needed")
        if self.fail is not None:
            raise self.fail
        self.connected.append(dict(peers))

    def begin_step(self, ctx: StepContext) -> None:
        self.steps.append(ctx)
        self.suspects = {1}

    def unlinked(self) -> list[int]:
        return [2]

    def stays(self) -> bool:
        return self.local.stays()

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return self.local.dispatch_combine(layer, hidden, topk_ids, topk_weights)

    def disconnect(self, peers: Iterable[RankId]) -> None:
        self.gone = set(peers)


class TestedWorker(EPWorker):
    """With the scripted exchange."""

    __test__ = False

    def make_exchange(self) -> Exchange:
        self.script = ScriptedExchange(self, self._ctx.doorbell)
        return self.script


def view(epoch: int, placement: Placement) -> View:
    return View(
        epoch=epoch, members=tuple(Member(rank=r, node="n", incarnation=r + 1) for r in placement), placement=placement
    )


def batch(
    epoch: int, *, token: int = 1, step: int = 1, chunks: list[SeqChunk] | None = None, masked: tuple[int, ...] = ()
) -> StepBatch:
    chunk = SeqChunk(1, 0, [5, 6, 7], [0], Sampling())
    return StepBatch(token, epoch, step, 0, list(masked), {0: [chunk] if chunks is None else chunks})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("m"), "mixtral", "bfloat16")


@pytest.fixture
def config(checkpoint: Path) -> ClusterConfig:
    return ClusterConfig(
        cluster="c",
        model=str(checkpoint),
        served_model_name="m",
        moe_layers=2,
        experts=8,
        kv_blocks=8,
        max_ranks=4,
        launch_deadline_s=60.0,
    )


@pytest.fixture
def worker(config: ClusterConfig) -> Iterator[TestedWorker]:
    with a_rank(config) as made:
        yield made


@contextlib.contextmanager
def a_rank(config: ClusterConfig, weights: bytes = b"") -> Iterator[TestedWorker]:
    """A rank with its model loaded, and perhaps a weight store."""
    doorbell = Doorbell()
    made = TestedWorker(WorkerContext(0, 1, "n", config, doorbell, {}, contextlib.nullcontext(), weights))
    made.init_device()
    made.load_model()
    try:
        yield made
    finally:
        made.script.hold.set()
        made.shutdown()
        doorbell.close()


def test_is_a_worker(worker: TestedWorker) -> None:
    as_worker: Worker = worker
    assert as_worker.exchange_handle() == b""
    assert not as_worker.pending()
    found = worker.identity()
    assert found == worker.identity()
    assert {name for name, value in found.parts.items() if value} == {
        "config.json", "weights", "code", "dtype", "exactness", "threads", "kernels"
    }  # fmt: skip
    assert len(found.parts["kernels"]) == 16


def test_the_load_of_experts_is_reported_now_and_then(worker: TestedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none is left out: what is not reported with one step is with a later one."""
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60)

    def report(step: int) -> bytes:
        result = worker.execute_model(batch(1, step=step))
        assert result is not None
        return result.load

    turns = iter((True, False, False, True))
    monkeypatch.setattr(worker._load_turns, "due", lambda *_: next(turns))
    first = np.frombuffer(report(1), dtype=np.uint32)
    assert (report(2), report(3)) == (b"", b"")
    assert np.frombuffer(report(4), dtype=np.uint32).tolist() == (3 * first).tolist()


def test_a_step_after_prepare(worker: TestedWorker) -> None:
    assert worker.execute_model(batch(1)).status is StepStatus.STALE  # type: ignore[union-attr]
    loaded = worker.prepare_epoch(view(1, WHOLE), {0: (1, b"me")}).get_output(60)
    assert loaded["bytes_loaded"] == sum(w.nbytes for w in worker.bank._held.values())
    assert worker.script.connected == [{}]
    result = worker.execute_model(batch(1, masked=(2, 3)))
    assert result is not None
    assert (result.status, result.epoch, result.rank, result.incarnation) == (StepStatus.OK, 1, 0, 1)
    assert [t.seq for t in result.tokens] == [1]
    assert (result.suspects, result.unlinked) == ([1], [2])
    load = np.frombuffer(result.load, dtype=np.uint32).reshape(2, 8)
    assert load.sum(axis=1).tolist() == [3 * 2, 3 * 2]
    assert worker.script.steps[-1].masked == 0b1100
    again = worker.execute_model(batch(1, step=2))
    assert again is not None
    assert again.tokens == result.tokens


@pytest.mark.parametrize("traced", [[1], [2]])
def test_a_step_of_a_traced_sequence_is_answered_with_its_times(worker: TestedWorker, traced: list[int]) -> None:
    """With the same tokens, and others are not timed."""
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60)
    plain = worker.execute_model(batch(1))
    timed = worker.execute_model(TracedStep.of(batch(1, step=2), traced))
    assert plain is not None
    assert timed is not None
    assert timed.tokens == plain.tokens
    assert isinstance(timed, TracedResult) == (traced == [1])
    if isinstance(timed, TracedResult):
        assert 0 < timed.exchange_s < timed.took_s
    assert worker._runner is not None
    assert worker._runner.moe.exchange is worker.script


@pytest.mark.parametrize(
    ("busy", "stays", "cores"), [([0], True, 4), ([0, 1], True, 2), ([0, 2], True, 4), ([0], False, 1)]
)
def test_a_step_takes_the_cores_that_no_other_rank_of_its_host_computes_on(
    worker: TestedWorker, monkeypatch: pytest.MonkeyPatch, busy: list[int], *, stays: bool, cores: int
) -> None:
    """And one where rows travel, since the others compute these then. Rank 2 is on another host."""
    whole = view(1, WHOLE | {1: WHOLE[0], 2: WHOLE[0]})
    members = tuple(msgspec.structs.replace(m, node="n" if m.rank < 2 else "other") for m in whole.members)
    worker.prepare_epoch(msgspec.structs.replace(whole, members=members), {}).get_output(60)
    taken: list[int] = []
    monkeypatch.setattr("workers.rank.worker.usable_cores", lambda: 4)
    monkeypatch.setattr(worker._backend, "use_cores", taken.append)
    monkeypatch.setattr(worker.script.local, "stays", lambda: stays)
    chunks = batch(1).ranks[0]
    result = worker.execute_model(msgspec.structs.replace(batch(1), ranks=dict.fromkeys(busy, chunks)))
    assert result is not None
    assert (result.status, taken) == (StepStatus.OK, [cores, 1])


def test_a_rank_without_chunks_says_nothing_but_flips(worker: TestedWorker) -> None:
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60)
    assert worker.execute_model(batch(1, chunks=[])) is None
    assert worker.execute_model(batch(1)).status is StepStatus.OK  # type: ignore[union-attr]


def test_steps_go_on_while_the_next_epoch_is_prepared(worker: TestedWorker) -> None:
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60)
    worker.script.hold.clear()
    coming = worker.prepare_epoch(view(2, HALF), {1: (2, b"x")})
    with pytest.raises(WaitTimeout, match="epoch 2"):
        coming.get_output(0.05)
    assert worker.execute_model(batch(1)).status is StepStatus.OK  # type: ignore[union-attr]
    assert worker.execute_model(batch(2)).status is StepStatus.STALE  # type: ignore[union-attr]
    with pytest.raises(Fenced):
        worker.commit_epoch(2)
    worker.script.hold.set()
    assert coming.get_output(60)["bytes_loaded"] == 0
    assert worker.execute_model(batch(1)).status is StepStatus.OK  # type: ignore[union-attr]
    worker.commit_epoch(2)
    assert worker.execute_model(batch(1)).status is StepStatus.STALE  # type: ignore[union-attr]


def test_memory_is_given_back_only_where_experts_were_read(
    worker: TestedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it is what the next step takes, such as the one after a death, for which nothing is read as a rule."""
    given_back = list[int]()
    monkeypatch.setattr("workers.rank.preparation.give_memory_back", lambda: given_back.append(1))
    assert worker.prepare_epoch(view(1, WHOLE), {}).get_output(60.0)["bytes_loaded"] > 0
    assert given_back == [1]
    assert worker.prepare_epoch(view(2, WHOLE), {}).get_output(60.0)["bytes_loaded"] == 0
    assert given_back == [1]


def test_retire_drops_what_is_not_needed_any_more(worker: TestedWorker) -> None:
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60)
    worker.execute_model(batch(1))
    worker.prepare_epoch(view(2, HALF), {1: (2, b"x")}).get_output(60)
    with pytest.raises(Fenced):
        worker.retire_epoch(3)
    worker.retire_epoch(2)  # all others are there; this rank flips with its next batch
    assert worker.bank.held() == {(layer, e) for layer in (0, 1) for e in (0, 1, 2, 3)}
    result = worker.execute_model(batch(2))
    assert result is not None
    assert result.status is StepStatus.COVERAGE_LOST  # the local exchange has no peers
    assert not result.tokens


def test_an_aborted_preparation_leaves_nothing(worker: TestedWorker) -> None:
    worker.prepare_epoch(view(1, HALF), {1: (2, b"x")}).get_output(60)
    worker.commit_epoch(1)
    aborted = worker.prepare_epoch(view(2, WHOLE), {})
    aborted.get_output(60)
    assert len(worker.bank.held()) == 16
    worker.retire_epoch(1)
    assert worker.bank.held() == {(layer, e) for layer in (0, 1) for e in (0, 1, 2, 3)}
    assert worker.script.gone == set()
    with pytest.raises(Fenced):
        worker.commit_epoch(2)


def test_retire_lets_go_of_those_who_left_and_of_no_newcomer(worker: TestedWorker) -> None:
    worker.prepare_epoch(view(1, HALF), {1: (2, b"x")}).get_output(60)
    worker.commit_epoch(1)
    alone = view(2, WHOLE)
    worker.prepare_epoch(alone, {}).get_output(60)
    worker.commit_epoch(2)
    worker.retire_epoch(2)
    left = {m.id for m in view(1, HALF).members} - {m.id for m in alone.members}
    assert left
    assert worker.script.gone == left, "a slot's next incarnation may have dialled already"
    worker.retire_epoch(2)
    assert worker.script.gone == set()


def test_a_replaced_preparation_is_never_used(worker: TestedWorker) -> None:
    worker.script.hold.clear()
    first = worker.prepare_epoch(view(1, HALF), {1: (2, b"x")})
    second = worker.prepare_epoch(view(1, WHOLE), {})
    worker.script.hold.set()
    second.get_output(60)
    with pytest.raises(Fenced):
        first.get_output(60)
    result = worker.execute_model(batch(1))
    assert result is not None
    assert (result.status, worker.script.steps[-1].view.placement) == (StepStatus.OK, WHOLE)


def test_a_failed_preparation_says_why_and_may_be_repeated(worker: TestedWorker) -> None:
    worker.script.fail = PeerTimeout("rank 1 did not answer")
    with pytest.raises(PeerTimeout, match="rank 1"):
        worker.prepare_epoch(view(1, WHOLE), {1: (2, b"x")}).get_output(60)
    assert worker.execute_model(batch(1)).status is StepStatus.STALE  # type: ignore[union-attr]
    worker.script.fail = None
    worker.prepare_epoch(view(1, WHOLE), {1: (2, b"x")}).get_output(60)
    assert worker.execute_model(batch(1)).status is StepStatus.OK  # type: ignore[union-attr]


def test_an_older_engine_has_no_effect(worker: TestedWorker) -> None:
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60)
    assert worker.execute_model(batch(1, token=9)).status is StepStatus.OK  # type: ignore[union-attr]
    assert worker.execute_model(batch(1, token=8)).status is StepStatus.STALE  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk", [SeqChunk(1, 0, [10**6], [0], Sampling()), SeqChunk(1, 0, [5], [9], Sampling())])
def test_a_broken_chunk_fails_its_step_only(worker: TestedWorker, chunk: SeqChunk) -> None:
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60)
    failed = worker.execute_model(batch(1, chunks=[chunk]))
    assert failed is not None
    assert failed.status is StepStatus.FAILED
    assert "Error" in failed.error
    assert worker.execute_model(batch(1)).status is StepStatus.OK  # type: ignore[union-attr]


def test_an_error_after_which_the_device_is_lost_ends_the_rank(
    worker: TestedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step at once; of a load, in another thread, when the main thread looks next."""
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60.0)
    broken = batch(1, chunks=[SeqChunk(1, 0, [5], [99], Sampling())])
    result = worker.execute_model(broken)
    assert result is not None
    assert result.status is StepStatus.FAILED
    assert worker._backend is not None

    def lost(error: BaseException) -> None:
        raise DeviceLost("unspecified launch failure") from error

    monkeypatch.setattr(worker._backend, "check", lost)
    with pytest.raises(DeviceLost):
        worker.execute_model(broken)
    worker.poll()
    worker.script.fail = PeerTimeout("peers did not answer")
    with pytest.raises(PeerTimeout):
        worker.prepare_epoch(view(2, WHOLE), {}).get_output(60.0)
    with pytest.raises(DeviceLost):
        worker.poll()


def test_a_step_without_memory_is_run_again_and_the_second_time_ends_the_rank(worker: TestedWorker) -> None:
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60.0)
    assert worker._runner is not None

    def short() -> None:
        raise OutOfDeviceMemory("tried to allocate 2 GiB")

    for expected in (StepStatus.FAILED, StepStatus.OK, StepStatus.FAILED):
        worker._runner.on_launched = short if expected is StepStatus.FAILED else lambda: None
        result = worker.execute_model(batch(1))
        assert result is not None
        assert result.status is expected
    with pytest.raises(DeviceFull, match=r"out of device memory: tried to allocate 2 GiB; lower --kv-cache-memory"):
        worker.execute_model(batch(1))


@pytest.mark.parametrize("wanted_by", ["its own step", "a peer"])
def test_experts_without_memory_are_counted_like_a_step(
    worker: TestedWorker, monkeypatch: pytest.MonkeyPatch, wanted_by: str
) -> None:
    """What says so is wrapped in the name of the expert."""
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60.0)

    def short(*_: object) -> None:
        raise OutOfDeviceMemory("tried to allocate 3 GiB")

    def one_turn() -> None:
        if wanted_by == "a peer":
            worker.poll()
        else:
            result = worker.execute_model(batch(1))
            assert result is not None
            assert result.status is StepStatus.FAILED

    def refuses() -> int:
        worker.exchange.failed(OutOfDeviceMemory("tried to allocate 3 GiB"))
        return 1

    monkeypatch.setattr(worker.bank, "compute_many", short)
    monkeypatch.setattr(worker.exchange, "pending", lambda: wanted_by == "a peer")
    monkeypatch.setattr(worker.exchange, "serve", refuses)
    one_turn()
    with pytest.raises(DeviceFull, match="tried to allocate 3 GiB"):
        one_turn()


def test_a_lack_of_memory_in_its_own_steps_refuses_no_peer(
    worker: TestedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.exchange, "pending", lambda: True)
    monkeypatch.setattr(worker.exchange, "serve", lambda: 1)
    for _ in range(3):
        worker.exchange.failed(OutOfDeviceMemory("tried to allocate 3 GiB"))  # as within a step
        worker.poll()


def test_a_newcomer_that_cannot_take_its_device_ends(worker: TestedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OutOfDeviceMemory("cuda:0: no room for a context")

    monkeypatch.setattr("workers.model.devices.open_backend", full)
    with pytest.raises(DeviceFull, match="no room for a context"):  # so its caller learns what the process ends for
        worker.init_device()
    with pytest.raises(DeviceFull, match="no room for a context"):
        worker.poll()


def test_a_newcomer_without_memory_for_its_experts_ends(worker: TestedWorker) -> None:
    worker.script.fail = OutOfDeviceMemory("tried to allocate 9 GiB")
    with pytest.raises(OutOfDeviceMemory):
        worker.prepare_epoch(view(1, WHOLE), {}).get_output(60.0)
    with pytest.raises(DeviceFull, match="9 GiB"):
        worker.poll()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_member_without_memory_for_more_experts_serves_on(worker: TestedWorker, steps: int) -> None:
    """Also one whose cluster has had no request yet."""
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60.0)
    for _ in range(steps):
        result = worker.execute_model(batch(1))
        assert result is not None
        assert result.status is StepStatus.OK
    worker.script.fail = OutOfDeviceMemory("tried to allocate 9 GiB")
    with pytest.raises(OutOfDeviceMemory):
        worker.prepare_epoch(view(2, WHOLE), {}).get_output(60.0)
    worker.poll()


@pytest.mark.parametrize("at", ["rows for peers", "an expert for peers", "a copy of blocks"])
def test_a_device_that_is_lost_beside_a_step_ends_the_rank(
    worker: TestedWorker, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """A rank without requests of its own has no step that would find it."""
    failure = RuntimeError("CUDA error: unspecified launch failure")

    def fails(*_: object) -> int:
        raise failure

    def lost(error: BaseException) -> None:
        if error is failure:
            raise DeviceLost("cuda:0: unspecified launch failure")

    assert worker._backend is not None
    assert worker._runner is not None
    monkeypatch.setattr(worker._backend, "check", lost)
    worker.poll()
    if at == "rows for peers":
        monkeypatch.setattr(worker.exchange, "pending", lambda: True)
        monkeypatch.setattr(worker.exchange, "serve", fails)
    elif at == "an expert for peers":
        worker.exchange.failed(failure)
    else:
        monkeypatch.setattr(worker._runner, "write_out", fails)
        with pytest.raises(DeviceLost, match="launch failure"):  # so the engine learns what the process ends for
            worker.copy_blocks(CopyBlocks(1, 1, RankId(0, 1), RankId(1, 1), [0]))
    with pytest.raises(DeviceLost, match="launch failure"):
        worker.poll()


def test_coverage_lost_inside_a_step_leaves_no_trace(worker: TestedWorker) -> None:
    worker.prepare_epoch(view(1, WHOLE), {}).get_output(60)
    prefill = worker.execute_model(batch(1))
    assert prefill is not None
    decode = [SeqChunk(1, 3, [prefill.tokens[0].token], [0], Sampling(logprobs=2))]
    expected = worker.execute_model(batch(1, chunks=decode))
    worker.bank.drop(frozenset((0, e) for e in range(8)))  # the second layer's experts are gone
    lost = worker.execute_model(batch(1, chunks=decode))
    assert lost is not None
    assert lost.status is StepStatus.COVERAGE_LOST
    worker.bank.load_all([(1, e) for e in range(8)])
    again = worker.execute_model(batch(1, chunks=decode))
    assert again is not None
    assert expected is not None
    assert again.tokens == expected.tokens


def test_order_of_calls_is_checked(checkpoint: Path) -> None:
    config = ClusterConfig(cluster="c", model=str(checkpoint), served_model_name="m", moe_layers=2, experts=8)
    doorbell = Doorbell()
    worker = TestedWorker(WorkerContext(0, 1, "n", config, doorbell, {}, contextlib.nullcontext()))
    try:
        with pytest.raises(ConfigError, match="before init_device"):
            worker.load_model()
        with pytest.raises(ConfigError, match="before load_model"):
            worker.prepare_epoch(view(1, WHOLE), {})
    finally:
        worker.shutdown()
        doorbell.close()


def test_only_what_is_read_of_the_checkpoint_waits_its_turn(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, config: ClusterConfig
) -> None:
    store, booked = WeightStore(), list[int]()
    monkeypatch.setattr(SharedWeights, "book", lambda self, nbytes: booked.append(nbytes) or 0.0)
    capped = replace(config, load_bytes_per_s=1, expert_bytes=123)

    def loaded(config: ClusterConfig, view: View) -> int:
        """How many reads were booked by a new rank that prepares this view."""
        with a_rank(config, store.handle()) as worker:
            booked.clear()
            worker.prepare_epoch(view, {}).get_output(60)
            return len(booked)

    half: Placement = {0: ((0, 1, 2, 3), ())}
    try:
        assert loaded(config, view(2, half)) == 0, "no cap"
        assert loaded(capped, view(2, WHOLE)) == 12, "four are in the store already"
        assert set(booked) == {123}
        assert loaded(capped, view(2, WHOLE)) == 0
    finally:
        store.close()
    fresh = WeightStore()
    try:
        with a_rank(capped, fresh.handle()) as worker:
            booked.clear()
            worker.prepare_epoch(replace(view(1, WHOLE), urgent=True), {}).get_output(60)
            assert not booked, "requests wait for it"
    finally:
        fresh.close()
