"""What queries may not look at: as the definition says, and in memory that does not grow with the context."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.model.attention_plan import TILE_POSITIONS, StepPlan, Tiles, plan_step
from workers.protocol.messages import SeqChunk

pytestmark = pytest.mark.unit

BLOCK_SIZE = 16
PLACES = st.tuples(st.integers(0, 700), st.integers(1, 300))  # start and tokens of a chunk


def plan_of(places: list[tuple[int, int]]) -> StepPlan:
    chunks = [
        SeqChunk(seq, start, [0] * count, list(range(-(-(start + count) // BLOCK_SIZE))))
        for seq, (start, count) in enumerate(places)
    ]
    return plan_step(chunks, BLOCK_SIZE, sum(count for _, count in places), torch.device("cpu"))


def masked(tiles: Tiles, window: int | None, first: int, end: int) -> torch.Tensor:
    """Scores of nothing but NaN and zeros, [tiles, positions, length], after the mask."""
    scores = torch.zeros(end - first, 2, tiles.positions, 1, tiles.seen(first, end))
    scores[:, 1] = torch.nan
    for band in tiles.mask(window, first, end):
        band.apply(scores)
    assert torch.equal(scores[:, 0].isinf(), scores[:, 1].isinf()), "what is hidden is hidden whatever it was"
    return scores[:, 0, :, 0]


@given(
    st.lists(PLACES, min_size=1, max_size=5),
    st.sampled_from([None, 1, 24, 100, 2000]),
    st.randoms(use_true_random=False),
)
def test_it_hides_what_comes_later_and_what_the_window_has_left(places, window, random) -> None:  # type: ignore[no-untyped-def]
    for tiles in plan_of(places).tiles:
        first = random.randrange(tiles.count)
        end = random.randint(first + 1, tiles.count)
        found = masked(tiles, window, first, end)
        cells, where = torch.arange(found.shape[-1]), tiles.where[first:end].unsqueeze(-1)
        hidden = cells > where
        if window is not None:
            hidden |= cells <= where - window
        assert torch.equal(found, torch.zeros(found.shape).masked_fill(hidden, -torch.inf))


@pytest.mark.parametrize("window", [None, 1000])
def test_a_long_context_takes_no_more_memory_than_a_short_one(window: int | None) -> None:
    """It is computed for the layers of a step once, and kept till its end."""
    taken = []
    for start in (2048, 32768):
        (tiles,) = plan_of([(start, 512)]).tiles
        bands = [band for tile in range(tiles.count) for band in tiles.mask(window, tile, tile + 1)]
        taken.append(sum(part.nbytes for band in bands for part in (band.kept, band.added) if part is not None))
    sides = 1 if window is None else 2
    assert taken[0] == taken[1] <= sides * 512 * max(TILE_POSITIONS) * 8
