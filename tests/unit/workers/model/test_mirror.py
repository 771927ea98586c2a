"""The contexts that decode steps gather: in the same memory whichever sequences decode, kept where a step follows one
of the same sequences, and never so much at once that a step takes long."""

from __future__ import annotations

import pytest
import torch

from workers.model.attention_plan import StepPlan, plan_step
from workers.model.cpu import attention, kv_cache
from workers.model.cpu.attention import CpuAttention
from workers.model.cpu.compute_threads import ComputeThreads
from workers.model.cpu.kv_cache import CpuKVCache, LayerCache
from workers.protocol.messages import SeqChunk

pytestmark = pytest.mark.unit

SIZE, HEADS, WIDTH, PROMPT = 16, 2, 8, 40
CONTEXT_BYTES = 64 * HEADS * 2 * WIDTH * torch.float32.itemsize  # of one sequence in one layer


class Decoding:
    """Layers of attention over sequences of 40 tokens; each step is one more token of some of them."""

    def __init__(self, layers: int = 1) -> None:
        self.attention = CpuAttention(CpuKVCache(layers, 40, SIZE, torch.float32), ComputeThreads())
        self.lengths = [PROMPT] * 4
        self.done: StepPlan | None = None
        self._random = torch.Generator().manual_seed(1)
        for seq in range(4):
            self._run([SeqChunk(seq, 0, [0] * PROMPT, self.blocks(seq))])

    def blocks(self, seq: int) -> list[int]:
        return list(range(10 * seq, 10 * seq + 4))

    @property
    def layers(self) -> list[LayerCache]:
        return self.attention.cache.layers

    def step(self, *seqs: int) -> list[tuple[int, int]]:
        """Where the mirrors are, after what is in them was compared with the cache."""
        self._run([SeqChunk(seq, self.lengths[seq], [0], self.blocks(seq)) for seq in seqs])
        for seq in seqs:
            self.lengths[seq] += 1
        where = []
        for layer in self.layers:
            if layer.mirror is not None:
                for kept, fresh in zip(layer.mirror, self.gather(layer), strict=True):
                    assert torch.equal(kept, fresh)
                where.append((layer.mirror.keys.data_ptr(), layer.mirror.values.data_ptr()))
        return where

    def gather(self, layer: LayerCache) -> kv_cache.Context:
        """What the last step looked at."""
        assert self.attention.plan is not None
        tiles = self.attention.plan.tiles[0]
        return layer.gather(tiles.rows(HEADS, HEADS * len(self.layers)), tiles.length)

    def _run(self, chunks: list[SeqChunk]) -> None:
        rows = sum(len(chunk.tokens) for chunk in chunks)
        plan = plan_step(chunks, SIZE, rows, torch.device("cpu"), self.done, tiled=True)
        self.attention.plan = self.done = plan
        for number in range(len(self.layers)):
            query, keys, values = torch.randn(3, 1, HEADS, rows, WIDTH, generator=self._random)
            self.attention.forward(number, query, keys, values, 0.1, None)


def test_mirrors_of_other_sequences_use_the_memory_again() -> None:
    """After a death twice as many decode at once."""
    decoding = Decoding()
    assert decoding.step(0, 1) == [], "it may be the only one with these sequences"
    where = decoding.step(0, 1)
    assert len(where) == 1
    assert decoding.step(0, 1) == where
    assert decoding.step(0, 1, 2, 3) == []
    assert decoding.step(0, 1, 2, 3) == where
    assert decoding.step(3, 1) == []
    assert decoding.step(3, 1) == where
    decoding._run([SeqChunk(2, 0, [0] * 5, decoding.blocks(2))])
    assert decoding.layers[0].mirror is None
    assert decoding.step(0, 1, 3) == []
    assert decoding.step(0, 1, 3) == where


def test_a_step_begins_to_keep_a_few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were kept stay so."""
    monkeypatch.setattr(attention, "KEPT_AT_ONCE", 2 * 2 * CONTEXT_BYTES)
    decoding = Decoding(layers=5)
    kept = [decoding.step(0, 1) for _ in range(5)]
    assert [len(where) for where in kept] == [0, 2, 4, 5, 5]
    assert kept[4][:4] == kept[2]


def test_contexts_that_are_not_kept_take_the_same_memory_in_all_layers() -> None:
    """Fresh memory for each would be faulted in page by page, in each step."""
    decoding = Decoding(layers=3)
    decoding.step(0, 1)
    used = {decoding.gather(layer).keys.data_ptr() for layer in decoding.layers}
    decoding.step(2, 3)
    assert {decoding.gather(layer).keys.data_ptr() for layer in decoding.layers} == used


@pytest.mark.parametrize(("most", "kept"), [(1, [0, 1, 0, 0, 0, 1]), (2, [0, 1, 0, 1, 0, 1])])
def test_contexts_that_take_too_much_are_not_kept(monkeypatch: pytest.MonkeyPatch, most: int, kept: list[int]) -> None:
    monkeypatch.setattr(kv_cache, "MIRROR_BYTES", most * CONTEXT_BYTES)
    decoding = Decoding()
    assert [len(decoding.step(*seqs)) for seqs in [(0,), (0,), (0, 1), (0, 1), (1,), (1,)]] == kept


def test_contexts_too_large_for_the_common_memory_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = Decoding()
    decoding.step(0, 1)
    common = [part.clone() for part in decoding.gather(decoding.layers[0])]
    monkeypatch.setattr(decoding.attention.cache, "scratch", kv_cache.Rooms(2 * CONTEXT_BYTES - 1))
    fresh = decoding.gather(decoding.layers[0])
    assert all(map(torch.equal, common, fresh))
    assert decoding.gather(decoding.layers[0]).keys.data_ptr() != fresh.keys.data_ptr()
