"""The KV cache of one rank on its GPU: [block, offset, head, width] for each layer, written by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class CudaLayerCache:
    """Keys and values of one layer; allocated when the first tokens show their shape."""

    def __init__(self, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self._cells = (blocks + 1, block_size)  # the last is for what must be written somewhere
        self._dtype = dtype
        self.keys = self.values = torch.empty(0)

    def write(self, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, heads, width] at `cells` [T]: block * block_size + offset."""
        if self.keys.numel() == 0:
            self.keys, self.values = self._room(keys), self._room(values)
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept.view(-1, *new.shape[1:]).index_copy_(0, cells, new.to(self._dtype))

    def _room(self, like: Tensor) -> Tensor:
        return torch.zeros(*self._cells, *like.shape[1:], dtype=self._dtype, device=like.device)


class CudaKVCache:
    """All layers' caches, the same blocks in each. Satisfies `KVCache`."""

    def __init__(self, layers: int, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.layers = [CudaLayerCache(blocks, block_size, dtype) for _ in range(layers)]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers; 0 before the first step."""
        return sum(part.nbytes for layer in self.layers for part in (layer.keys, layer.values)) // (self.blocks + 1)

    def put(self, block: int, bits: memoryview[int]) -> bool:
        """It is not in host memory."""
        return False

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
