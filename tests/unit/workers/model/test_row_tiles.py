"""Row tiles: how many rows a call is filled up to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from workers.model.row_tiles import CANDIDATES, REFERENCE, RowTiles, calibrate_product

pytestmark = pytest.mark.unit


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


def test_what_a_matrix_is_measured_with_is_not_larger_than_it() -> None:
    weight = torch.zeros(4096, 128, dtype=torch.bfloat16)
    with Largest() as largest:
        tiles = calibrate_product(lambda rows, w: functional.linear(rows, w), weight, "a test")
    assert REFERENCE in tiles.sizes
    assert largest.nbytes == weight.nbytes
