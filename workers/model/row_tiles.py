"""Row tiles: the numbers of rows at which a row's bits do not depend on how many rows share the call.

Kernels choose their method by the number of rows, so a token's result can change with its batch mates. The reference
is the 16-row call. At load other row counts are tried against it, and then only counts are used that gave the same bits
on this very device: small batches are padded up to one, large ones are cut.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from membership.base.errors import ModelError

REFERENCE = 16
SAMPLE = 128  # rows
TELLING = 1 << 14  # elements of products, in nearly each of which another order of summation shows
MADE_UP = 1024  # rows of a matrix to measure with, after which it repeats them
CANDIDATES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128)


def cut(rows: Tensor, size: int) -> list[Tensor]:
    """Consecutive pieces of `size` rows; the last may be shorter."""
    return [rows[start : start + size] for start in range(0, rows.shape[0], size)]


@dataclass(frozen=True)
class RowTiles:
    """Row counts, ascending, whose results are known to agree."""

    sizes: tuple[int, ...]

    def padded(self, rows: int) -> int:
        """The smallest number of rows >= `rows` made of whole largest tiles and one more tile."""
        largest = self.sizes[-1]
        whole, rest = divmod(rows, largest)
        return whole * largest + (self.sizes[bisect_left(self.sizes, rest)] if rest else 0)

    def run(self, fn: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`fn` of all rows, called with agreeing row counts only."""
        count = rows.shape[0]
        padded = self.padded(count)
        if padded != count:
            rows = torch.cat((rows, rows.new_zeros(padded - count, *rows.shape[1:])))
        largest = self.sizes[-1]
        out = fn(rows) if padded <= largest else torch.cat([fn(part) for part in cut(rows, largest)])
        return out if padded == count else out[:count]


def calibrate(fn: Callable[[Tensor], Tensor], sample: Tensor, what: str, enough: int = SAMPLE) -> RowTiles:
    """Find the row counts on which `fn` agrees with its 16-row results on the 128 rows of `sample`.

    `enough` of them, whole calls and two where they fit, are looked at for each count. ModelError if already the 16-row
    results depend on the order of the rows; `what` is named in it.
    """
    reference = torch.cat([fn(part) for part in cut(sample, REFERENCE)])

    def agree(size: int, rows: int, there: Callable[[Tensor], Tensor] = fn) -> bool:
        pieces = zip(cut(sample[:rows], size), cut(reference[:rows], size), strict=True)
        return all(torch.equal(there(part), wanted) for part, wanted in pieces)

    if not agree(REFERENCE, enough, lambda part: fn(part.flip(0)).flip(0)):
        hint = "--exactness stock serves without the guarantee"
        raise ModelError(f"{what}: a row's result depends on its place in the batch on this machine", hint=hint)
    looked_at = {size: min(max(enough, 2 * size), SAMPLE) // size * size for size in CANDIDATES}
    return RowTiles(tuple(size for size, rows in looked_at.items() if agree(size, rows)))


def calibrate_product(
    product: Callable[[Tensor, Tensor], Tensor],
    weight: Tensor,
    what: str,
    lay: Callable[[Tensor], Tensor] = lambda made: made,
) -> RowTiles:
    """Find the row counts on which `product(rows, lay(weight))`, for `weight` [N, K], sums in the same order.

    The numbers are chosen so that every true sum is zero: what comes out is rounding error alone, which shows the order
    of summation in nearly every element. With ordinary numbers bfloat16's rounding would hide it.
    """
    generator = torch.Generator().manual_seed(0)
    out_width, width = weight.shape
    pairs = width // 2
    order = torch.randperm(width, generator=generator)
    left, right = order[:pairs], order[pairs : 2 * pairs]
    rows, some = torch.zeros(SAMPLE, width), torch.zeros(min(out_width, MADE_UP), width, dtype=weight.dtype)
    rows[:, left] = torch.randn(SAMPLE, pairs, generator=generator)
    rows[:, right] = -rows[:, left]
    some[:, left] = torch.randn(len(some), pairs, generator=generator).to(weight.dtype)
    some[:, right] = some[:, left]
    columns = torch.empty(out_width, width, dtype=weight.dtype)
    for part in torch.split(columns, len(some)):  # an output layer is large, a loading rank is not to be
        part.copy_(some[: len(part)])
    made = lay(columns.to(weight.device))
    enough = min(-(-TELLING // (out_width * REFERENCE)) * REFERENCE, SAMPLE)  # few rows of a wide matrix
    return calibrate(lambda part: product(part, made), rows.to(weight.device, weight.dtype), what, enough)
