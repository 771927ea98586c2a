"""Copies KV blocks between two ranks' caches, over memory that both can reach: the bulk area of their exchange link.

The source writes, the engine hears of it, the target reads: no rank waits for another. Each message begins with whom
and what it is for, so that a stale one is never taken for the one that was announced. The bits are copied as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from membership.base.errors import RankError
from workers.model.kv import KVCache

_HEADER = struct.Struct("<4q")  # engine token, copy, blocks, bytes per block
HEADER_BYTES = 64
Stamp = tuple[int, int]
"""(engine token, copy): what a message belongs to."""
Outbox = Callable[[int], "memoryview[int]"]
"""Gives memory of so many bytes, or as many as there are, that the target can read."""


def write_out(cache: KVCache, blocks: Sequence[int], outbox: Outbox, stamp: Stamp) -> int:
    """Copy as many of `blocks` as there is room for, from the first on; how many that were."""
    size = cache.block_bytes
    room = outbox(HEADER_BYTES + len(blocks) * size)
    count = min(len(blocks), (len(room) - HEADER_BYTES) // size)
    if count < 1:
        raise RankError(f"a KV block of {size} bytes does not fit into {len(room) - HEADER_BYTES} bytes")
    for cells, rows, there in _parts(cache, blocks[:count], room):
        there.copy_(cells.index_select(0, rows))
    _HEADER.pack_into(room, 0, *stamp, count, size)
    return count


def take_in(cache: KVCache, blocks: Sequence[int], room: memoryview[int], stamp: Stamp) -> int:
    """Copy what was written out under this `stamp` into `blocks`."""
    found, wanted = _HEADER.unpack_from(room), (*stamp, len(blocks), cache.block_bytes)
    if found != wanted:
        raise RankError(f"KV blocks {found} have come instead of {wanted}")
    for cells, rows, there in _parts(cache, blocks, room):
        cells.index_copy_(0, rows, there.to(cells.device))
    return len(blocks)


def _parts(cache: KVCache, blocks: Sequence[int], room: memoryview[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each layer's keys, and values: the cells, the rows that `blocks` have there, and their place in `room`."""
    picked, at = torch.tensor(blocks), HEADER_BYTES
    for cells in cache.parts:
        heads = cells.shape[0] // cache.blocks
        rows = (picked[None, :] + torch.arange(heads)[:, None] * cache.blocks).reshape(-1).to(cells.device)
        shape = (len(rows), cells.shape[1])
        there = torch.frombuffer(room, dtype=cells.dtype, count=shape[0] * shape[1], offset=at).view(shape)
        at += there.nbytes
        yield cells, rows, there
