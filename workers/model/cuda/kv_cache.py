"""The KV cache of one rank on its GPU: [block, offset, head, width] for each layer, written by position.

All layers lie in one piece of memory, so that another process that has its descriptor finds each block by its number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import triton
from torch import Tensor

from membership.base.errors import ModelError
from workers.model.backend import Lasting, Reached
from workers.model.cuda.kernels import copy_blocks, write_cells
from workers.model.cuda.kv_memory import KvMemory, own_memory

ALIGNMENT = 256
WORD_BYTES = 8
WORDS = 1024  # that a program copies at a time
Take = Callable[[int, torch.device], KvMemory]


class CudaLayerCache:
    """Keys and values of one layer."""

    def __init__(self, cache: CudaKVCache) -> None:
        self._cache = cache
        self.keys = self.values = torch.empty(0)

    def write(self, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, heads, width] at `cells` [T]: block * block_size + offset. ModelError."""
        self._cache.lay_out(keys, values)
        (rows, heads, width), value_width = keys.shape, values.shape[2]
        keys, values = (part if part.stride(2) == 1 else part.contiguous() for part in (keys, values))
        write_cells[(rows, heads)](
            keys, values, cells, self.keys, self.values, keys.stride(1), keys.stride(0), values.stride(1),
            values.stride(0), HEADS=heads, WIDTH=width, VALUE_WIDTH=value_width,
            WIDE=triton.next_power_of_2(width), VALUE_WIDE=triton.next_power_of_2(value_width),
        )  # fmt: skip


class CudaKVCache:
    """All layers' caches, the same blocks in each. Satisfies `KVCache`. Allocated when tokens show their shape."""

    def __init__(self, layers: int, blocks: int, block_size: int, dtype: torch.dtype, take: Take = own_memory) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.layers = [CudaLayerCache(self) for _ in range(layers)]
        self._dtype, self._take = dtype, take
        self._shapes: tuple[torch.Size, ...] = ()  # of a token's keys and values
        self._parts = torch.empty(0)
        self._memory = KvMemory(torch.empty(0))
        self._nbytes = 0  # of the memory that others may reach

    def lay_out(self, keys: Tensor, values: Tensor) -> None:
        """For keys and values [T, heads, width]. ModelError if other layers have another shape."""
        shapes = keys.shape[1:], values.shape[1:]
        if not self._shapes:
            self._allocate(shapes, keys.device)
        if self._shapes != shapes:
            raise ModelError(f"attention layers of two shapes: {self._shapes} and {shapes}")

    def _allocate(self, shapes: tuple[torch.Size, ...], device: torch.device) -> None:
        cells = self.blocks + 1, self.block_size  # the last is for what must be written somewhere
        sizes = [shape.numel() * self.block_size * self._dtype.itemsize for shape in shapes]  # of a block
        steps = [-(-size * cells[0] // ALIGNMENT) * ALIGNMENT for size in sizes]
        self._memory = self._take(len(self.layers) * sum(steps), device)
        self._nbytes = self._memory.lasting.nbytes
        at, parts = 0, []
        for layer in self.layers:
            found = []
            for shape, size, step in zip(shapes, sizes, steps, strict=True):
                found.append(self._memory.room[at : at + size * cells[0]].view(self._dtype).view(*cells, *shape))
                parts.append((at // WORD_BYTES, size // WORD_BYTES))
                at += step
            layer.keys, layer.values = found
        self._parts = torch.tensor(parts, device=device)
        self._shapes = shapes
        if self._nbytes and self._whole_words():
            self._copy([self.blocks], self._memory.room.data_ptr(), [self.blocks])  # the kernel is made now, not later

    def _whole_words(self) -> bool:
        """Whether a block's keys and values of a layer are whole words each."""
        parts = (self.layers[0].keys, self.layers[0].values)
        return all(part.numel() and part[0].nbytes % WORD_BYTES == 0 for part in parts)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers; 0 before the first step."""
        return sum(part[0].nbytes for layer in self.layers for part in (layer.keys, layer.values) if part.numel())

    def put(self, block: int, bits: memoryview[int]) -> bool:
        """It is not in host memory."""
        return False

    def hand_over(self) -> Lasting:
        """See `KVCache`."""
        given, self._memory = self._memory.lasting, self._memory._replace(lasting=Lasting())
        return given

    def fetch(self, blocks: Sequence[int], pool: Reached, there: Sequence[int]) -> bool:
        """See `KVCache`."""
        if not self._nbytes or pool.size != self._nbytes or not self._whole_words():
            return False
        self._copy(blocks, pool.address, there)
        return True

    def _copy(self, blocks: Sequence[int], address: int, there: Sequence[int]) -> None:
        numbers = torch.tensor([[address] * len(blocks), list(there), list(blocks)], device=self._parts.device)
        copy_blocks[len(self._parts), len(blocks)](numbers, self._memory.room.view(torch.int64), self._parts, WORDS)

    def copy_out(self, blocks: Sequence[int], room: memoryview[int]) -> None:
        """Copy the bits of `blocks` to the start of `room`, in host memory."""
        for cells, picked, there in self._places(blocks, room):
            there.copy_(cells.index_select(0, picked))

    def copy_in(self, blocks: Sequence[int], room: memoryview[int]) -> None:
        """Copy what `copy_out` left in `room` into `blocks`."""
        for cells, picked, there in self._places(blocks, room):
            cells.index_copy_(0, picked, there.to(cells.device))

    def _places(self, blocks: Sequence[int], room: memoryview[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each layer's keys, and values: the cells, the blocks, and their place in `room`."""
        at = 0
        for cells in (part for layer in self.layers for part in (layer.keys, layer.values)):
            shape = (len(blocks), *cells.shape[1:])
            count = len(blocks) * cells[0].numel()
            there = torch.frombuffer(room, dtype=cells.dtype, count=count, offset=at).view(shape)
            at += there.nbytes
            yield cells, torch.tensor(blocks, device=cells.device), there
