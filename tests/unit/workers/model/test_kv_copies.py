"""KV blocks come into a cache only under the stamp (engine token, copy number) that was announced."""

from __future__ import annotations

import pytest
import torch

from membership.base.errors import RankError
from workers.model.cpu.kv_cache import CpuKVCache
from workers.model.kv_transfer import HEADER_BYTES, take_in, write_out

pytestmark = pytest.mark.unit

BLOCKS, STAMP = 6, (7, 20)


def filled(seed: int) -> CpuKVCache:
    cache = CpuKVCache(layers=2, blocks=BLOCKS, block_size=4, dtype=torch.float32)
    values = torch.randn(2, 24, 2, 8, generator=torch.Generator().manual_seed(seed))
    layout = cache.layout(values[0], values[1])
    rows = torch.arange(BLOCKS)[:, None, None] * layout.rows_per_block + torch.arange(2)
    cells = (rows * layout.keys_per_row + torch.arange(4)[:, None]).reshape(-1)
    for layer in cache.layers:
        layer.write(cells, cells, values[0], values[1])
    return cache


@pytest.fixture
def source() -> CpuKVCache:
    return filled(1)


@pytest.fixture
def copied(source: CpuKVCache) -> memoryview:
    """Blocks 1 and 4 of the source, written out under STAMP."""
    room = memoryview(bytearray(HEADER_BYTES + 2 * source.block_bytes))
    write_out(source, [1, 4], lambda nbytes: room, STAMP)
    return room


@pytest.mark.parametrize("stamp", [(7, 21), (8, 20)], ids=["another copy", "another engine"])
def test_blocks_of_another_copy_are_refused_and_leave_nothing_behind(
    copied: memoryview, stamp: tuple[int, int]
) -> None:
    target, untouched = filled(2), filled(2)
    with pytest.raises(RankError):
        take_in(target, [0, 5], copied, stamp)
    assert torch.equal(target.memory, untouched.memory)


def test_announced_blocks_arrive_unaltered(source: CpuKVCache, copied: memoryview) -> None:
    target = filled(2)
    take_in(target, [0, 5], copied, STAMP)
    assert torch.equal(source.memory[[1, 4]], target.memory[[0, 5]])
    assert source.memory.count_nonzero() == source.memory.numel(), "every cell of the blocks was written"
