"""KV blocks come into a cache only under the stamp (engine token, copy number) that was announced."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from membership.base.errors import ModelError, RankError
from workers.ipc.shared_memory import SegmentError
from workers.model.backend import NO_POOL
from workers.model.cpu.kv_cache import CpuKVCache
from workers.model.kv_transfer import HEADER_BYTES, read_in, take_in, write_out

pytestmark = pytest.mark.unit

BLOCKS, STAMP = 6, (7, 20)
ONE = torch.zeros(1, 2, 8)


def filled(seed: int, pool: int = NO_POOL) -> CpuKVCache:
    cache = CpuKVCache(layers=2, blocks=BLOCKS, block_size=4, dtype=torch.float32, pool_fd=pool)
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


@pytest.fixture
def pool() -> Iterator[int]:
    fd = os.memfd_create("kv", os.MFD_ALLOW_SEALING)
    yield fd
    os.close(fd)


@pytest.fixture
def own_pool() -> Iterator[int]:
    fd = os.memfd_create("own", os.MFD_ALLOW_SEALING)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("pooled", [True, False], ids=["into a pool", "into other memory"])
def test_blocks_are_read_out_of_the_memory_that_another_has_left(
    pool: int, own_pool: int, monkeypatch: pytest.MonkeyPatch, *, pooled: bool
) -> None:
    source, target, untouched = filled(1, pool), filled(2, own_pool if pooled else NO_POOL), filled(2)
    left = source.memory.clone()
    del source
    monkeypatch.setattr("workers.model.kv_transfer.PIECE_BYTES", 2 * target.block_bytes + 1)
    assert read_in(target, [0, 5, 2], pool, [4, 1, 3]) == 2, "as many as may be at once"
    assert torch.equal(target.memory[[0, 5]], left[[4, 1]])
    assert torch.equal(target.memory[1:5], untouched.memory[1:5])


def test_memory_of_another_size_is_refused(pool: int) -> None:
    target, before = filled(2), filled(2)
    with pytest.raises(RankError):
        read_in(target, [0], pool, [0])  # the rank died before it had filled it
    os.ftruncate(pool, 2 * target.memory.nbytes)
    with pytest.raises(RankError):
        read_in(target, [0], pool, [0])
    assert torch.equal(target.memory, before.memory)


def test_a_model_that_is_loaded_again_has_the_same_memory(pool: int) -> None:
    first = filled(1, pool)
    again = filled(2, pool)
    assert torch.equal(first.memory, again.memory)
    with pytest.raises(SegmentError, match="bytes, not"):
        CpuKVCache(layers=3, blocks=BLOCKS, block_size=4, dtype=torch.float32, pool_fd=pool).layout(*[ONE] * 2)


def test_layers_of_two_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match="two shapes"):
        filled(1).layout(ONE[:, :1], ONE[:, :1])
