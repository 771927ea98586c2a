"""Row tiles: how many rows a call is filled up to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from workers.model.row_tiles import CANDIDATES, REFERENCE, RowTiles, calibrate_product

pytestmark = pytest.mark.unit
Numbers = npt.NDArray[np.float32]


def test_calls_of_many_rows_are_not_filled_up_by_more_than_a_quarter() -> None:
    """Their time goes with their rows, and a prompt's 512 tokens give one of 64 experts, 8 each, about 64."""
    tiles = RowTiles(CANDIDATES)
    for rows in range(65, 1024):
        assert rows <= tiles.padded(rows) <= 1.25 * rows, rows


class Largest(TorchDispatchMode):
    """Notes the largest tensor that comes of any operation, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


def _measured(width: int, product: Callable[[Tensor, Tensor], Tensor]) -> tuple[int, ...]:
    return calibrate_product(product, torch.zeros(width, 128), "a test").sizes


@pytest.mark.parametrize("width", [8, 64, 1024, 8192])
def test_a_count_whose_calls_sum_in_another_order_is_not_used(width: int) -> None:
    for odd in set(CANDIDATES) - {REFERENCE}:

        def product(rows: Tensor, weight: Tensor, odd: int = odd) -> Tensor:
            turned = slice(None, None, -1) if len(rows) == odd else slice(None)
            return sum_in_order(rows.numpy()[:, turned], weight.numpy()[:, turned])

        assert _measured(width, product) == tuple(size for size in CANDIDATES if size != odd)


def sum_in_order(rows: Numbers, weight: Numbers) -> Tensor:
    """A product whose sums go from the first column to the last."""
    total = np.zeros((len(rows), len(weight)), np.float32)
    for column in range(rows.shape[1]):
        total += rows[:, column, None] * weight[None, :, column]
    return torch.from_numpy(total)


def test_each_place_of_a_call_is_looked_at() -> None:
    for place in (0, 1, 7, 12, 23):

        def product(rows: Tensor, weight: Tensor, place: int = place) -> Tensor:
            out = functional.linear(rows.double(), weight.double())
            if len(rows) == 24:
                out[place] += 1
            return out

        assert 24 not in _measured(8192, product)


def test_a_wide_matrix_is_measured_with_few_calls() -> None:
    """Each reads all of it: an output layer has some 100 MB, and whoever starts for the first time waits for it."""
    calls = list[int]()

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        calls.append(len(rows))
        return functional.linear(rows, weight)

    _measured(4096, product)
    assert {1, 2, 4, 128} <= set(calls)
    assert len(calls) <= 64


def test_what_a_matrix_is_measured_with_is_not_larger_than_it() -> None:
    weight = torch.zeros(4096, 128, dtype=torch.bfloat16)
    with Largest() as largest:
        tiles = calibrate_product(lambda rows, w: functional.linear(rows, w), weight, "a test")
    assert REFERENCE in tiles.sizes
    assert largest.nbytes == weight.nbytes
