"""Moves KV blocks between two ranks' caches, over the bulk area of their exchange link: memory that both can reach, or
a message between hosts.

The source writes, the engine learns that it is there, the target reads: no rank waits for another. Each message begins
with what it is for, so that a stale one is never taken for the one that was announced. The bits are copied as they are.

What a rank that has died had is read from its pool instead: the memory of its cache, which its agent has kept. A GPU
copies it itself, also from another one.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Sequence

from membership.base.errors import RankError
from workers.model.backend import KVCache, Reached

PIECE_BYTES = 64 << 20  # most that is read at once for one request, some 30 ms: the next step waits for it
FETCH_BYTES = 1 << 30  # the same between GPUs, some 3 ms
_HEADER = struct.Struct("<4q")  # engine token, copy, blocks, bytes per block
HEADER_BYTES = 64
Stamp = tuple[int, int]
"""(engine token, number of the copy): what a message belongs to."""
Outbox = Callable[[int], "memoryview[int]"]
"""Gives memory for the target: the number of bytes asked for, or as many as there are."""


def write_out(cache: KVCache, blocks: Sequence[int], outbox: Outbox, stamp: Stamp) -> int:
    """Copy `blocks`, from the first on, as far as there is room; returns how many. RankError if not even one fits."""
    size = cache.block_bytes
    room = outbox(HEADER_BYTES + len(blocks) * size)
    count = min(len(blocks), (len(room) - HEADER_BYTES) // size)
    if count < 1:
        raise RankError(f"a KV block of {size} bytes does not fit into {len(room) - HEADER_BYTES} bytes")
    cache.copy_out(blocks[:count], room[HEADER_BYTES:])
    _HEADER.pack_into(room, 0, *stamp, count, size)
    return count


def take_in(cache: KVCache, blocks: Sequence[int], room: memoryview[int], stamp: Stamp) -> int:
    """Copy what was written out under this `stamp` into `blocks`; returns how many. RankError if it is another copy."""
    found: tuple[int, ...] = _HEADER.unpack_from(room) if len(room) >= HEADER_BYTES else ()
    wanted = (*stamp, len(blocks), cache.block_bytes)
    if found != wanted:
        raise RankError(f"KV blocks {found} have come instead of {wanted}")
    cache.copy_in(blocks, room[HEADER_BYTES:])
    return len(blocks)


def fetch_in(cache: KVCache, blocks: Sequence[int], pool: Reached, there: Sequence[int]) -> int:
    """As `read_in`, out of a pool on a device, which ours reaches."""
    count = min(len(blocks), max(1, FETCH_BYTES // max(1, cache.block_bytes)))
    if not cache.fetch(blocks[:count], pool, there[:count]):
        raise RankError(f"a pool of {pool.size} bytes on a device does not fit this cache")
    return count


def read_in(cache: KVCache, blocks: Sequence[int], pool: int, there: Sequence[int]) -> int:
    """Read blocks `there` of a pool into `blocks`, from the first on, as many as may be at once; returns how many.

    RankError if the pool is of another size than this cache's, or either is not in host memory.
    """
    size = cache.block_bytes
    if os.fstat(pool).st_size // cache.blocks != size or not size:
        raise RankError(f"the pool has {os.fstat(pool).st_size} bytes, not {cache.blocks} KV blocks of {size}")
    count = min(len(blocks), max(1, PIECE_BYTES // size))
    with mmap.mmap(pool, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped, memoryview(mapped) as left:
        for block, source in zip(blocks[:count], there[:count], strict=True):
            with left[source * size : (source + 1) * size] as bits:
                if len(bits) != size or not cache.put(block, bits):
                    raise RankError(f"KV block {source} cannot be read from the pool")
    return count
