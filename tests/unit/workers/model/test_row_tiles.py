"""Row tiles: how many rows a call is filled up to."""

from __future__ import annotations

import pytest

from workers.model.row_tiles import CANDIDATES, RowTiles

pytestmark = pytest.mark.unit


def test_calls_of_many_rows_are_not_filled_up_by_more_than_a_quarter() -> None:
    """Their time goes with their rows, and a prompt's 512 tokens give one of 64 experts, 8 each, about 64."""
    tiles = RowTiles(CANDIDATES)
    for rows in range(65, 1024):
        assert rows <= tiles.padded(rows) <= 1.25 * rows, rows
