"""The KV cache of one rank: preallocated blocks, written by position. A step that runs again rewrites the same cells.

All layers of a block lie together, in one piece: so a block is copied as a whole, and another process that has the
memory's descriptor reads it by its number alone. In it there is one row of memory per (layer, head), its keys before
its values: gathering a sequence is then a copy of whole rows, and comes out in the order that the attention's matrix
products want. Kept in fp32 on CPUs: the attention computes in fp32, and converting the whole context in every step
would cost more than it saves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from membership.base.errors import ModelError
from workers.ipc.shared_memory import Segment
from workers.model.backend import NO_POOL, Lasting, Reached

MIRROR_BYTES = 256 << 20  # most memory for keeping the gathered contexts of all layers from one decode step to the next
SCRATCH_BYTES = 128 << 20  # most memory for those of one layer that are not kept


class Context(NamedTuple):
    """Gathered keys and values [(tile, head), cell, width]."""

    keys: Tensor
    values: Tensor

    def append(self, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put one more token of each sequence, [tokens, heads, width], into its place."""
        for context, new in ((self.keys, keys), (self.values, values)):
            width = new.shape[-1]
            context.view(-1, width).index_copy_(0, cells, new.reshape(-1, width).float())

    def part(self, own: slice, seen: int) -> Context:
        """The first `seen` cells of some of them."""
        return Context(self.keys[own, :seen], self.values[own, :seen])

    @property
    def nbytes(self) -> int:
        """Memory it takes, in bytes."""
        return int(self.keys.nbytes + self.values.nbytes)


def storable(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept of new keys and values [tokens, heads, width]: those of a value that is not finite are a key that is
    no number and zeros. So a row that sees the cell is no number there, and no other: a product multiplies what is
    hidden by 0 as well, and 0 x inf would be NaN.
    """
    if math.isfinite(values.sum()):  # it is not where one of them is not
        return keys, values
    finite = values.isfinite().all(-1, keepdim=True)
    return keys.where(finite, math.nan), values.where(finite, 0.0)


class Rooms:
    """Memory that gathered contexts use again and again: the page faults of fresh memory take longer than the copy."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._parts: tuple[Tensor, ...] = ()

    def take(self, sources: Sequence[Tensor], rows: int) -> list[Tensor] | None:
        """Memory for so many rows of each source, with what is in it; None, and nothing is held, if that is too much.

        There is room for twice as much, untouched: then others may join.
        """
        sizes = [rows * source.shape[1] for source in sources]
        nbytes = sum(size * source.itemsize for size, source in zip(sizes, sources, strict=True))
        if nbytes > self._most:
            self._parts = ()
            return None
        if [part.numel() >= size for part, size in zip(self._parts, sizes, strict=False)] != [True] * len(sizes):
            self._parts = ()  # before more is taken
            spare = 2 if 2 * nbytes <= self._most else 1
            self._parts = tuple(source.new_empty(spare * size) for source, size in zip(sources, sizes, strict=True))
        return [part[:size].view(rows, -1) for part, size in zip(self._parts, sizes, strict=True)]


class Layout(NamedTuple):
    """Where one token's keys and values are: the same in each layer, counted from where that layer begins."""

    rows_per_block: int  # of all layers and heads
    keys_per_row: int  # key cells in the width of a row
    values_per_row: int  # value cells in it


class LayerCache:
    """Keys and values of one attention layer."""

    def __init__(self, cache: CpuKVCache) -> None:
        self._cache = cache
        self.mirror: Context | None = None  # the contexts of the last step, if they were kept
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self._rooms = Rooms(MIRROR_BYTES // cache.count)
        self._key_cells = self.keys
        self._value_cells = self.values

    def write(self, key_cells: Tensor, value_cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [tokens, heads, width] of this step at these cells [tokens * heads]."""
        for cells, places, new in ((self._key_cells, key_cells, keys), (self._value_cells, value_cells, values)):
            cells.index_copy_(0, places, new.reshape(-1, new.shape[-1]).to(cells.dtype))

    def gather(self, rows: Tensor, length: int) -> Context:
        """Contexts [len(rows) * block_size / length, length, width] of the given rows, in fp32, until the next call for
        any layer.
        """
        return self._gather(rows, length, self._cache.scratch) or self.pick(rows, length)

    def pick(self, rows: Tensor, length: int) -> Context:
        """The same, in memory of its own. In any thread."""
        return self._context(length, self.keys.index_select(0, rows), self.values.index_select(0, rows))

    def keep(self, rows: Tensor, length: int) -> Context | None:
        """The same, kept as the mirror; None if that takes too much."""
        self.mirror = self._gather(rows, length, self._rooms)
        return self.mirror

    def _gather(self, rows: Tensor, length: int, rooms: Rooms) -> Context | None:
        sources = self.keys, self.values
        outs = rooms.take(sources, len(rows))
        if outs is None:
            return None
        for source, out in zip(sources, outs, strict=True):
            torch.index_select(source, 0, rows, out=out)
        return self._context(length, *outs)

    def _context(self, length: int, keys: Tensor, values: Tensor) -> Context:
        widths = self._key_cells.shape[-1], self._value_cells.shape[-1]
        return Context(*(p.view(-1, length, w).float() for p, w in zip((keys, values), widths, strict=True)))

    def lay_out(self, memory: Tensor, offset: int, rows: int, row: int, widths: tuple[int, int]) -> None:
        """Its part of the memory: `rows` rows of `row` numbers from `offset` on, the first of each block's its own."""
        size = self._cache.block_size
        starts = offset, offset + size * widths[0]
        self.keys, self.values = (
            memory.as_strided((rows, size * width), (row, 1), start)
            for width, start in zip(widths, starts, strict=True)
        )
        self._key_cells, self._value_cells = (
            memory.as_strided(((rows - 1) * row // width + size, width), (width, 1), start)
            for width, start in zip(widths, starts, strict=True)
        )


class CpuKVCache:
    """All layers' caches, the same blocks in each. Satisfies `KVCache`. Allocated when tokens show their shape."""

    def __init__(self, layers: int, blocks: int, block_size: int, dtype: torch.dtype, pool_fd: int = NO_POOL) -> None:
        """`pool_fd`: an empty memfd to keep it in, which stays the caller's."""
        self.blocks = blocks
        self.block_size = block_size
        self.count = layers
        self.scratch = Rooms(SCRATCH_BYTES)
        self.layers = [LayerCache(self) for _ in range(layers)]
        self._dtype, self._pool_fd = dtype, pool_fd
        self._memory = torch.empty(0)
        self._shapes: tuple[int, ...] = ()  # heads, width of a key and of a value

    def layout(self, keys: Tensor, values: Tensor) -> Layout:
        """For keys and values [tokens, heads, width]. ModelError if other layers have another shape."""
        heads, widths = keys.shape[1], (keys.shape[-1], values.shape[-1])
        if not self._shapes:
            self._allocate(keys, heads, widths)
        if self._shapes != (heads, *widths):
            raise ModelError(f"attention layers of two shapes: {self._shapes} and {(heads, *widths)}")
        row = self._row(widths)
        return Layout(len(self.layers) * heads, row // widths[0], row // widths[1])

    def _row(self, widths: tuple[int, int]) -> int:
        """Numbers in a row: cells of either kind can be counted through from one row to the next."""
        step = math.lcm(*widths)
        return -(-self.block_size * sum(widths) // step) * step

    def _allocate(self, like: Tensor, heads: int, widths: tuple[int, int]) -> None:
        row, layers = self._row(widths), len(self.layers)
        shape = self.blocks, layers * heads * row
        if self._pool_fd != NO_POOL and like.device.type == "cpu":
            room = Segment.fill(self._pool_fd, math.prod(shape) * self._dtype.itemsize).view()
            self._memory = torch.frombuffer(room, dtype=self._dtype, count=math.prod(shape)).view(shape)
        else:
            self._memory = torch.zeros(shape, dtype=self._dtype, device=like.device)
        self._shapes = heads, *widths
        for number, layer in enumerate(self.layers):
            rows = (self.blocks - 1) * layers * heads + heads
            layer.lay_out(self._memory, number * heads * row, rows, row, widths)

    @property
    def memory(self) -> Tensor:
        """All that it holds: [blocks, numbers of a block]."""
        return self._memory

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers; 0 before the first step."""
        return self._memory.nbytes // self.blocks

    def put(self, block: int, bits: memoryview[int]) -> bool:
        """Replace one block by the bits of another; False if it is not in host memory.

        Written through the descriptor where there is one: pages that are replaced whole are neither faulted in nor
        zeroed before, which takes longer than the copy.
        """
        if self._memory.device.type != "cpu" or not self._shapes:
            return False
        if self._pool_fd == NO_POOL:
            self._memory[block].numpy().data.cast("B")[:] = bits
            return True
        return os.pwrite(self._pool_fd, bits, block * len(bits)) == len(bits)

    def hand_over(self) -> Lasting:
        """It is not on a device; who forked us has the memfd."""
        return Lasting()

    def fetch(self, blocks: Sequence[int], pool: Reached, there: Sequence[int]) -> bool:
        """It is not on a device."""
        return False

    def copy_out(self, blocks: Sequence[int], room: memoryview[int]) -> None:
        """Copy the bits of `blocks` to the start of `room`."""
        picked = torch.tensor(blocks, device=self._memory.device)
        self._there(blocks, room).copy_(self._memory.index_select(0, picked))

    def copy_in(self, blocks: Sequence[int], room: memoryview[int]) -> None:
        """Copy what `copy_out` left in `room` into `blocks`."""
        picked = torch.tensor(blocks, device=self._memory.device)
        self._memory.index_copy_(0, picked, self._there(blocks, room).to(self._memory.device))

    def _there(self, blocks: Sequence[int], room: memoryview[int]) -> Tensor:
        shape = len(blocks), self._memory.shape[1]
        return torch.frombuffer(room, dtype=self._dtype, count=math.prod(shape)).view(shape)
