"""The KV cache of one rank: preallocated blocks, written by position. A step that runs again rewrites the same cells.

One row of memory per (head, block): gathering a sequence is then a copy of whole rows, and comes out in the order that
the attention's matrix products want. Kept in fp32 on CPUs: the attention computes in fp32, and converting the whole
context in every step would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Context(NamedTuple):
    """Gathered keys and values [(tile, head), cell, width]."""

    keys: Tensor
    values: Tensor

    def append(self, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put one more token of each sequence, [tokens, heads, width], into its place."""
        for context, new in ((self.keys, keys), (self.values, values)):
            width = new.shape[-1]
            context.view(-1, width).index_copy_(0, cells, new.reshape(-1, width).float())

    @property
    def nbytes(self) -> int:
        """Memory it takes, in bytes."""
        return int(self.keys.nbytes + self.values.nbytes)


class LayerCache:
    """Keys and values of one attention layer; allocated when the first tokens show their shape."""

    def __init__(self, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._dtype = dtype
        self.mirror: Context | None = None  # the contexts of the last step, if that was a plain decode step
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self._key_cells = self.keys
        self._value_cells = self.values

    def write(self, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [tokens, heads, width] of this step at `cells` [tokens * heads]."""
        if self.keys.numel() == 0:
            self._allocate(keys, values)
        self._key_cells.index_copy_(0, cells, keys.reshape(-1, keys.shape[-1]).to(self._dtype))
        self._value_cells.index_copy_(0, cells, values.reshape(-1, values.shape[-1]).to(self._dtype))

    def gather(self, rows: Tensor, length: int) -> Context:
        """Contexts [len(rows) * block_size / length, length, width] of the given rows, in fp32."""
        keys = self.keys.index_select(0, rows).view(-1, length, self._key_cells.shape[-1])
        values = self.values.index_select(0, rows).view(-1, length, self._value_cells.shape[-1])
        return Context(keys.float(), values.float())

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        rows = keys.shape[1] * self._blocks
        self.keys = torch.zeros(rows, self._block_size * keys.shape[-1], dtype=self._dtype, device=keys.device)
        self.values = torch.zeros(rows, self._block_size * values.shape[-1], dtype=self._dtype, device=keys.device)
        self._key_cells = self.keys.view(-1, keys.shape[-1])
        self._value_cells = self.values.view(-1, values.shape[-1])


class CpuKVCache:
    """All layers' caches, the same blocks in each. Satisfies `KVCache`."""

    def __init__(self, layers: int, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.layers = [LayerCache(blocks, block_size, dtype) for _ in range(layers)]

    @property
    def parts(self) -> list[Tensor]:
        """All layers' keys and values, each [heads * blocks, cells]; empty before the first step (or warm-up)."""
        return [part for layer in self.layers for part in (layer.keys, layer.values)]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return sum(part.nbytes for part in self.parts) // self.blocks

    def copy_out(self, blocks: Sequence[int], room: memoryview[int]) -> None:
        """Copy the bits of `blocks` to the start of `room`."""
        for cells, rows, there in self._places(blocks, room):
            there.copy_(cells.index_select(0, rows))

    def copy_in(self, blocks: Sequence[int], room: memoryview[int]) -> None:
        """Copy what `copy_out` left in `room` into `blocks`."""
        for cells, rows, there in self._places(blocks, room):
            cells.index_copy_(0, rows, there.to(cells.device))

    def _places(self, blocks: Sequence[int], room: memoryview[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each layer's keys, and values: the cells, the rows that `blocks` have there, and their place in `room`."""
        picked, at = torch.tensor(blocks), 0
        for cells in self.parts:
            heads = cells.shape[0] // self.blocks
            rows = (picked[None, :] + torch.arange(heads)[:, None] * self.blocks).reshape(-1).to(cells.device)
            shape = (len(rows), cells.shape[1])
            there = torch.frombuffer(room, dtype=cells.dtype, count=shape[0] * shape[1], offset=at).view(shape)
            at += there.nbytes
            yield cells, rows, there
