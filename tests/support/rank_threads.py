"""Ranks with real workers and the real exchange, each in a thread, and a minimal engine over them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from membership.base.errors import ElasticError
from membership.base.network import Network
from membership.placement.plan import plan
from membership.store.records import ClusterConfig, Member, View
from workers.ipc.doorbell import Doorbell
from workers.protocol.messages import CopyBlocks, SeqChunk, StepBatch, StepResult, StepStatus
from workers.rank.worker import EPWorker
from workers.rank.worker_api import WorkerContext

DEADLINE_S = 30.0


class RankThread:
    """One rank's busy loop."""

    def __init__(self, rank: int, config: ClusterConfig, network: Network | None) -> None:
        self.doorbell = Doorbell()
        context = WorkerContext(rank, rank + 1, "n", config, self.doorbell, {}, contextlib.nullcontext())
        self.worker = EPWorker(replace(context, network=network))
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
            done = self.worker.copy_blocks(message)
            if message.arriving:
                return done
            self.worker.post_blocks(message, lambda: self.results.put(done))
            return None
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

    def __init__(self, path: Path, ranks: int, network: Network | None = None) -> None:
        self.config = ClusterConfig(
            cluster="c", model=str(path), served_model_name="m", moe_layers=2, experts=8,
            kv_blocks=64, max_model_len=256,
        )  # fmt: skip
        self.ranks = [RankThread(rank, self.config, network) for rank in range(ranks)]
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
