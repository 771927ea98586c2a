"""The layout of a window: parts do not overlap, and the kernels are compiled with what it says."""

from __future__ import annotations

import pytest

from membership.base.errors import ConfigError
from workers.exchange.cuda.window import ALIGNMENT, BANKS, MOST_ROWS, WORD_BYTES, WindowShape

pytestmark = pytest.mark.unit

SHAPE = WindowShape(ranks=3, held=5, rows=7, hidden=24, top_k=2)


def test_parts_lie_one_behind_the_other() -> None:
    words, rows = 3 * 5 * WORD_BYTES, 3 * (7 * 2) * SHAPE.row_bytes
    sizes = {"asked": BANKS * words, "answered": words, "questions": BANKS * rows, "answers": rows}
    ends = [*SHAPE.offsets.values()][1:]
    for (name, size), end in zip(sizes.items(), ends, strict=True):
        assert SHAPE.offsets[name] + size <= end < SHAPE.offsets[name] + size + ALIGNMENT
        assert SHAPE.offsets[name] % ALIGNMENT == 0


def test_kernels_get_the_sizes_and_offsets() -> None:
    given = SHAPE.definitions()
    assert {name: given[name] for name in ("RANKS", "HELD", "ROWS", "TOP_K")} == dict(RANKS=3, HELD=5, ROWS=7, TOP_K=2)
    assert given["CHUNKS"] * 16 == SHAPE.row_bytes
    assert given["ROOM"] == 3 * 7 * 2
    assert given["ANSWERS_AT"] == SHAPE.offsets["answers"]


@pytest.mark.parametrize("wrong", [{"ranks": 9}, {"ranks": 0}, {"rows": MOST_ROWS + 1}, {"hidden": 20}])
def test_what_the_kernels_cannot_do_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        WindowShape(**{"ranks": 2, "held": 4, "rows": 8, "hidden": 32, "top_k": 2} | wrong)
