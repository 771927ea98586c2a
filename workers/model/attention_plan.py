"""What all attention layers of one step share: which cells to write, which tiles of queries read which blocks.

A tile is a few consecutive tokens of one sequence with everything they may look at. Tiles of one kind are computed
together; in invariant mode only tile shapes that were checked on this machine are used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.protocol.messages import SeqChunk

Ints = npt.NDArray[np.int64]
TILE_POSITIONS = (1, 8, 32, 64, 128)  # tokens per tile


def context_length(longest: int, block_size: int) -> int:
    """Round a context up to one of few lengths: at most an eighth more, and whole blocks."""
    step = 64
    while step * 8 < longest:
        step *= 2
    step = max(step, block_size)
    return -(-longest // step) * step


class Band(NamedTuple):
    """Cells that queries may not look at: none, or some as `kept` and `added` say, [tiles, 1, positions, cells].

    A score is replaced and not just added to, as it may be no number: by two operations that are vectorised, which the
    one that selects is not.
    """

    cells: slice
    kept: Tensor | None = None  # int32: the bits that are left of a score: all, or none
    added: Tensor | None = None  # float32: 0 or -inf

    def apply(self, scores: Tensor) -> None:
        """To [tiles, heads, positions, rows of each, length], in place."""
        hidden = scores[..., self.cells]
        if self.kept is None or self.added is None:
            hidden.fill_(-torch.inf)
            return
        hidden.view(torch.int32).bitwise_and_(self.kept.unsqueeze(3))
        hidden.add_(self.added.unsqueeze(3))


@dataclass
class Tiles:
    """Equal tiles: `count` of them with `positions` tokens each, all reading `length` cells."""

    positions: int
    length: int
    count: int
    tokens: Tensor  # [count * positions] row of each query in the step (padding repeats the tile's first)
    tables: list[list[int]]  # the blocks that each tile reads
    block_size: int
    where: Tensor  # [count, positions] position of each query in its sequence
    real: Tensor  # indices into count * positions that are not padding
    targets: Tensor  # their rows in the step
    in_order: bool  # targets are 0, 1, 2, ... and the only ones of the step
    firsts: list[int]  # position of each tile's first query
    ends: list[int]  # position after its last one
    cell_rows: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[tuple[int | None, int, int], list[Band]] = field(default_factory=dict)

    def rows(self, heads: int, rows_per_block: int) -> Tensor:
        """Rows of a layer's cache that hold the context of every (tile, head), in that order."""
        if heads not in self.cell_rows:
            blocks = np.zeros((self.count, 1, self.length // self.block_size), dtype=np.int64)
            for i, table in enumerate(self.tables):
                blocks[i, 0, : len(table)] = table
            rows = blocks * rows_per_block + np.arange(heads, dtype=np.int64)[None, :, None]
            self.cell_rows[heads] = torch.from_numpy(rows.reshape(-1)).to(self.tokens.device)
        return self.cell_rows[heads]

    def mask(self, window: int | None, first: int, end: int) -> list[Band]:
        """Where these tiles' queries may not look, of the cells that they see; what all may look at has no band.

        In any thread. So it takes the square of a tile's tokens, however long the context is.
        """
        key = window, first, end
        if key not in self.masks:
            earliest, latest = min(self.firsts[first:end]), max(self.ends[first:end]) - 1
            bands = [self._band(window, first, end, earliest + 1, latest + 1)]
            if latest + 1 < self.seen(first, end):
                bands.append(Band(slice(latest + 1, self.seen(first, end))))
            if window is not None:
                bands.append(Band(slice(0, max(0, earliest - window + 1))))
                bands.append(self._band(window, first, end, earliest - window + 1, min(earliest, latest - window) + 1))
            self.masks[key] = [band for band in bands if band.cells.start < band.cells.stop]
        return self.masks[key]

    def _band(self, window: int | None, first: int, end: int, start: int, stop: int) -> Band:
        """Of the cells from `start` to `stop`, of which some may be before the first."""
        span = slice(max(0, start), max(0, stop))
        if span.start >= span.stop:
            return Band(span)
        where = self.where[first:end].unsqueeze(-1)
        cells = torch.arange(span.start, span.stop, device=where.device)
        hidden = (cells > where).unsqueeze(1)
        if window is not None:
            hidden |= (cells <= where - window).unsqueeze(1)
        added = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
        return Band(span, hidden.int() - 1, added)

    def seen(self, first: int, end: int) -> int:
        """How many cells these tiles have to look at: one of few lengths."""
        return min(context_length(max(self.ends[first:end]), self.block_size), self.length)


@dataclass
class StepPlan:
    """One step's tokens, packed chunk after chunk."""

    rows: int
    padded: int
    tokens: Tensor  # [1, padded]
    positions: Tensor  # [1, padded]
    last: list[int]  # the row of each chunk's last token
    tiles: list[Tiles]
    starts: list[int]  # each chunk's first position
    cells: list[int]  # where each row's key goes: block * block_size + offset
    tables: list[list[int]]  # each chunk's blocks
    block_size: int
    followed: int = 0  # how many steps right before it had the same sequences, each one token further
    _cells_of: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether this is a decode step: one token of each sequence, all in one kind of tile."""
        return len(self.tiles) == 1 and self.tiles[0].positions == 1 and self.tiles[0].in_order

    def cache_cells(self, heads: int, rows_per_block: int, cells_per_row: int) -> Tensor:
        """Where the step's keys, or values, go in a layer's cache, for every (token, head)."""
        found = self._cells_of.get((1, heads, cells_per_row))
        if found is not None:
            return found
        blocks, offsets = np.divmod(np.array(self.cells), self.block_size)
        return self._cells(blocks * (rows_per_block * cells_per_row) + offsets, heads, 1, cells_per_row)

    def mirror_cells(self, heads: int) -> Tensor:
        """Where a plain step's keys go in the gathered context [token, head, cell]."""
        length = self.tiles[0].length
        first = np.arange(self.rows) * heads * length + np.array(self.starts)
        return self._cells(first, heads, 0, length)

    def _cells(self, first: Ints, heads: int, kind: int, stride: int) -> Tensor:
        key = (kind, heads, stride)
        if key not in self._cells_of:
            cells = first[:, None] + np.arange(heads)[None, :] * stride
            self._cells_of[key] = torch.from_numpy(cells.reshape(-1)).to(self.tokens.device)
        return self._cells_of[key]


def _cut(chunks: Sequence[SeqChunk]) -> dict[tuple[int, int], list[tuple[int, int, int, int]]]:
    """Cut chunks into tiles (chunk, first row, first position, tokens), keyed by (tokens per tile, rough context)."""
    found: dict[tuple[int, int], list[tuple[int, int, int, int]]] = defaultdict(list)
    row = 0
    for index, chunk in enumerate(chunks):
        done, left = 0, len(chunk.tokens)
        while left:
            size = next((p for p in TILE_POSITIONS if p >= left), TILE_POSITIONS[-1])
            used = min(size, left)
            end = chunk.start + done + used
            found[size, max(end - 1, 127).bit_length()].append((index, row + done, chunk.start + done, used))
            done += used
            left -= used
        row += len(chunk.tokens)
    return found


def _tiles(
    size: int,
    parts: list[tuple[int, int, int, int]],
    chunks: Sequence[SeqChunk],
    block_size: int,
    all_rows: int,
    device: torch.device,
) -> Tiles:
    longest = max(position + used for _, _, position, used in parts)
    length = context_length(longest, block_size)
    tables = [chunks[index].blocks[: -(-(position + used) // block_size)] for index, _, position, used in parts]
    offsets = np.arange(size)[None, :]
    inside = offsets < np.array([p[3] for p in parts])[:, None]
    offsets = np.where(inside, offsets, 0)
    rows = np.array([p[1] for p in parts])[:, None] + offsets
    where = np.array([p[2] for p in parts])[:, None] + offsets
    targets = rows[inside]
    in_order = targets.size == all_rows and bool((targets == np.arange(all_rows)).all())
    return Tiles(
        positions=size,
        length=length,
        count=len(parts),
        tokens=torch.from_numpy(rows.reshape(-1)).to(device),
        tables=tables,
        block_size=block_size,
        where=torch.from_numpy(where).to(device),
        real=torch.from_numpy(np.flatnonzero(inside.reshape(-1))).to(device),
        targets=torch.from_numpy(targets).to(device),
        in_order=in_order,
        firsts=[part[2] for part in parts],
        ends=[part[2] + part[3] for part in parts],
    )


def _cells(chunk: SeqChunk, block_size: int) -> list[int]:
    blocks, start = chunk.blocks, chunk.start
    if len(chunk.tokens) == 1:  # of a decode step, for which a GPU waits
        return [blocks[start // block_size] * block_size + start % block_size]
    positions = range(start, start + len(chunk.tokens))
    return [blocks[p // block_size] * block_size + p % block_size for p in positions]


def plan_step(
    chunks: Sequence[SeqChunk],
    block_size: int,
    padded: int,
    device: torch.device,
    before: StepPlan | None = None,
    *,
    tiled: bool = True,
) -> StepPlan:
    """Lay out `chunks` as one packed sequence of `padded` rows; `before` is the plan of the step just completed.

    Without tiles if the attention that gets the plan uses none.
    """
    ids = [token for chunk in chunks for token in chunk.tokens]
    positions = [p for c in chunks for p in range(c.start, c.start + len(c.tokens))]
    padding = [0] * (padded - len(ids))
    follows = before is not None and _follows(chunks, before)
    if not tiled:
        tiles = []
    elif before is not None and follows:
        tiles = [_advance(before.tiles[0], chunks)]
    else:
        cut = _cut(chunks)
        tiles = [_tiles(size, parts, chunks, block_size, len(ids), device) for (size, _), parts in cut.items()]
    return StepPlan(
        rows=len(ids),
        padded=padded,
        tokens=torch.tensor([ids + padding], device=device),
        positions=torch.tensor([positions + padding], device=device),
        last=[end - 1 for end in accumulate(len(c.tokens) for c in chunks)],
        tiles=tiles,
        starts=[c.start for c in chunks],
        cells=[cell for c in chunks for cell in _cells(c, block_size)],
        tables=[c.blocks for c in chunks],
        block_size=block_size,
        followed=before.followed + 1 if before is not None and follows else 0,
    )


def _follows(chunks: Sequence[SeqChunk], before: StepPlan) -> bool:
    """Whether each chunk is the next token of what stood in the same place of a plain step, in the same blocks.

    Only then do the contexts gathered for that step still hold what the cache holds: nothing else was written since.
    """
    if not before.plain or len(chunks) != before.rows:
        return False
    tiles = before.tiles[0]
    return all(
        len(chunk.tokens) == 1
        and chunk.start == start + 1
        and chunk.start < tiles.length
        and chunk.blocks[: len(table)] == table
        for chunk, start, table in zip(chunks, before.starts, tiles.tables, strict=True)
    )


def _advance(tiles: Tiles, chunks: Sequence[SeqChunk]) -> Tiles:
    """The same tiles, one token further."""
    size = tiles.block_size
    tables = [c.blocks[: c.start // size + 1] for c in chunks]
    firsts, ends = [c.start for c in chunks], [c.start + 1 for c in chunks]
    return replace(tiles, tables=tables, where=tiles.where + 1, firsts=firsts, ends=ends, cell_rows={}, masks={})
