"""The gathered contexts that decode steps keep stay in the same memory when other sequences decode."""

from __future__ import annotations

import pytest
import torch

from workers.model.attention_plan import StepPlan, plan_step
from workers.model.cpu import attention
from workers.model.cpu.attention import CpuAttention
from workers.model.cpu.kv_cache import CpuKVCache, LayerCache
from workers.protocol.messages import SeqChunk

pytestmark = pytest.mark.unit

SIZE, HEADS, WIDTH, PROMPT = 16, 2, 8, 40


class Decoding:
    """One layer of attention over sequences of 40 tokens; each step is one more token of some of them."""

    def __init__(self) -> None:
        self.attention = CpuAttention(CpuKVCache(1, 40, SIZE, torch.float32))
        self.lengths = [PROMPT] * 4
        self.done: StepPlan | None = None
        self._random = torch.Generator().manual_seed(1)
        for seq in range(4):
            self._run([SeqChunk(seq, 0, [0] * PROMPT, self.blocks(seq))])

    def blocks(self, seq: int) -> list[int]:
        return list(range(10 * seq, 10 * seq + 4))

    @property
    def layer(self) -> LayerCache:
        return self.attention.cache.layers[0]

    def step(self, *seqs: int) -> tuple[int, int]:
        """Where its mirror is, after what is in it was compared with the cache."""
        self._run([SeqChunk(seq, self.lengths[seq], [0], self.blocks(seq)) for seq in seqs])
        for seq in seqs:
            self.lengths[seq] += 1
        mirror, plan = self.layer.mirror, self.attention.plan
        assert mirror is not None
        assert plan is not None
        rows = plan.tiles[0].rows(HEADS, HEADS)
        for kept, fresh in zip(mirror, self.layer.gather(rows, plan.tiles[0].length), strict=True):
            assert torch.equal(kept, fresh)
        return mirror.keys.data_ptr(), mirror.values.data_ptr()

    def _run(self, chunks: list[SeqChunk]) -> None:
        rows = sum(len(chunk.tokens) for chunk in chunks)
        plan = plan_step(chunks, SIZE, rows, torch.device("cpu"), self.done, tiled=True)
        self.attention.plan = self.done = plan
        query, keys, values = torch.randn(3, 1, HEADS, rows, WIDTH, generator=self._random)
        self.attention.forward(0, query, keys, values, 0.1, None)


def test_mirrors_of_other_sequences_use_the_memory_again() -> None:
    """After a death twice as many decode at once."""
    decoding = Decoding()
    where = decoding.step(0, 1)
    assert decoding.step(0, 1) == where
    assert decoding.step(0, 1, 2, 3) == where
    assert decoding.step(0, 1, 2, 3) == where
    assert decoding.step(3, 1) == where
    decoding._run([SeqChunk(2, 0, [0] * 5, decoding.blocks(2))])
    assert decoding.layer.mirror is None
    assert decoding.step(0, 1, 3) == where


def test_contexts_that_take_too_much_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = Decoding()
    decoding.step(0)
    context = decoding.layer.mirror
    assert context is not None
    monkeypatch.setattr(attention, "MIRROR_BYTES", context.nbytes)
    decoding.step(1)
    with pytest.raises(AssertionError):
        decoding.step(0, 1)
    assert decoding.layer.mirror is None
    decoding.step(1)
