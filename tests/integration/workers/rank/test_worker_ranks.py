"""Real workers linked by the real exchange: the same bits over 1, 2, 4 and 6 ranks, and across changes of the view.

Each rank is a thread here; tests elsewhere kill ranks that are processes.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from membership.base.errors import ElasticError
from membership.placement.plan import plan
from membership.store.records import ClusterConfig, Member, View
from tests.support.families import VOCAB, write_checkpoint
from tests.support.model_helpers import prompts
from workers.ipc.doorbell import Doorbell
from workers.protocol.messages import CopyBlocks, Sampling, SeqChunk, StepBatch, StepResult, StepStatus
from workers.rank.worker import EPWorker
from workers.rank.worker_api import WorkerContext

pytestmark = pytest.mark.integration

DEADLINE_S = 30.0
NEW_TOKENS = 10
BLOCKS_PER_SEQ = 5


class RankThread:
    """One rank's busy loop."""

    def __init__(self, rank: int, config: ClusterConfig) -> None:
        self.doorbell = Doorbell()
        self.worker = EPWorker(WorkerContext(rank, rank + 1, "n", config, self.doorbell, {}, contextlib.nullcontext()))
        self.worker.init_device()
        self.worker.load_model()
        self.batches: queue.SimpleQueue[StepBatch | CopyBlocks] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[StepResult | int | str] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stop.is_set():
            self.doorbell.wait(self._awake, 1.0)
            self.worker.poll()
            with contextlib.suppress(queue.Empty):
                result = self._take(self.batches.get_nowait())
                if result is not None:
                    self.results.put(result)

    def _take(self, message: StepBatch | CopyBlocks) -> StepResult | int | str | None:
        if isinstance(message, StepBatch):
            return self.worker.execute_model(message)
        try:
            return self.worker.copy_blocks(message)
        except ElasticError as error:
            return str(error)  # the error itself would hold on to the lanes' memory

    def _awake(self) -> bool:
        return self.worker.pending() or not self.batches.empty() or self._stop.is_set()

    def close(self) -> None:
        self._stop.set()
        self.doorbell.ring()
        self._thread.join(DEADLINE_S)
        self.worker.shutdown()
        self.doorbell.close()


class Fleet:
    """Ranks and a minimal engine."""

    def __init__(self, path: Path, ranks: int) -> None:
        self.config = ClusterConfig(
            cluster="c", model=str(path), served_model_name="m", moe_layers=2, experts=8,
            kv_blocks=64, max_model_len=256,
        )  # fmt: skip
        self.ranks = [RankThread(rank, self.config) for rank in range(ranks)]
        self.step = 0
        self.view = View(epoch=0)

    def use(self, ranks: Sequence[int], redundancy: float = 2.0) -> None:
        """Prepare and commit a view of `ranks`."""
        placement = plan(2, 8, list(ranks), redundancy if len(ranks) > 1 else 1.0, self.view.placement or None)
        members = tuple(Member(rank=r, node="n", incarnation=r + 1) for r in ranks)
        self.view = View(epoch=self.view.epoch + 1, members=members, placement=placement)
        peers = {r: (r + 1, self.ranks[r].worker.exchange_handle()) for r in ranks}
        coming = [self.ranks[r].worker.prepare_epoch(self.view, peers) for r in ranks]
        for preparation in coming:
            preparation.get_output(DEADLINE_S)

    def run(self, chunks: dict[int, list[SeqChunk]]) -> dict[int, tuple[int, object]]:
        """One step: sequence -> (token, log probabilities)."""
        self.step += 1
        batch = StepBatch(1, self.view.epoch, self.step, 0, [], chunks)
        for rank in self.view.ranks:
            self.ranks[rank].batches.put(batch)
            self.ranks[rank].doorbell.ring()
        found = {}
        for rank in chunks:
            result = self.ranks[rank].results.get(timeout=DEADLINE_S)
            assert isinstance(result, StepResult)
            assert (result.status, result.step) == (StepStatus.OK, self.step), result.error
            found.update({t.seq: (t.token, t.logprobs) for t in result.tokens})
        return found

    def copy(self, order: CopyBlocks) -> int:
        """Have the rank whose turn it is do its half of a copy; how many blocks it did."""
        rank = self.ranks[order.addressee[0]]
        rank.batches.put(order)
        rank.doorbell.ring()
        done = rank.results.get(timeout=DEADLINE_S)
        if isinstance(done, str):
            raise ElasticError(done)
        assert isinstance(done, int)
        return done

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


@pytest.fixture(scope="module", params=["mixtral-bfloat16", "deepseek_v3-float32"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, dtype = request.param.split("-")
    return write_checkpoint(tmp_path_factory.mktemp("m"), family, dtype)


@pytest.fixture
def fleet(checkpoint: Path) -> Iterator[Fleet]:
    made = Fleet(checkpoint, 6)
    try:
        yield made
    finally:
        made.close()


def generate(
    fleet: Fleet, work: list[list[int]], rng: random.Random, homes: Sequence[int]
) -> dict[tuple[int, int], object]:
    """Run all prompts at once, each on a random home; (sequence, position) -> (token, exact log probabilities)."""
    home = {seq: rng.choice(list(homes)) for seq in range(len(work))}
    tokens = {seq: list(prompt) for seq, prompt in enumerate(work)}
    done = dict.fromkeys(tokens, 0)
    blocks = {seq: list(range(seq * BLOCKS_PER_SEQ, (seq + 1) * BLOCKS_PER_SEQ)) for seq in tokens}
    found: dict[tuple[int, int], object] = {}
    while any(len(tokens[s]) < len(work[s]) + NEW_TOKENS for s in tokens):
        chunks: dict[int, list[SeqChunk]] = {}
        for seq, prompt in enumerate(work):
            if len(tokens[seq]) < len(prompt) + NEW_TOKENS and rng.random() < 0.8:
                piece = tokens[seq][done[seq] : done[seq] + rng.choice((2, 13, 64))]
                last = done[seq] + len(piece) == len(tokens[seq])
                sampling = Sampling(logprobs=2) if last else None
                chunks.setdefault(home[seq], []).append(SeqChunk(seq, done[seq], piece, blocks[seq], sampling))
                done[seq] += len(piece)
        for seq, token in (fleet.run(chunks) if chunks else {}).items():
            found[seq, len(tokens[seq])] = token
            tokens[seq].append(token[0])
    return found


def test_same_bits_over_any_number_of_ranks(fleet: Fleet) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    work = prompts(9, VOCAB, rng, longest=60)
    fleet.use([0])
    expected = generate(fleet, work, rng, [0])
    for ranks in ([0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [1, 4, 5], [3]):
        fleet.use(ranks)
        assert generate(fleet, work, rng, ranks) == expected, ranks


def test_a_peer_that_never_comes_holds_up_no_later_view(fleet: Fleet) -> None:
    """A rank that died while a view was being prepared never links; the repair must not wait for it."""
    worker = fleet.ranks[0].worker
    fleet.use([0])
    of_two = plan(2, 8, [0, 1], 2.0, None)
    members = (Member(rank=0, node="n", incarnation=1), Member(rank=1, node="n", incarnation=99))
    worker.prepare_epoch(View(epoch=2, members=members, placement=of_two), {1: (99, b"")})
    fleet.use([0])
    assert fleet.view.epoch == 2
    fleet.run({0: [SeqChunk(0, 0, [1, 2, 3], [0], Sampling())]})
