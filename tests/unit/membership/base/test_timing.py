"""The table of times: complete, true to its constants, and each constant is used where its row says."""

from __future__ import annotations

import re

import pytest

from membership.base import timing
from membership.base.timing import TIMINGS, Timing
from tests.support import ROOT

pytestmark = pytest.mark.unit


def test_each_constant_has_one_row_with_its_value() -> None:
    constants = {name: value for name, value in vars(timing).items() if re.fullmatch(r"[A-Z_]+_S", name)}
    assert {row.name: row.value_s for row in TIMINGS} == constants
    assert len(TIMINGS) == len(constants)


@pytest.mark.parametrize("row", TIMINGS, ids=lambda row: row.name)
def test_it_is_used_where_its_row_says(row: Timing) -> None:
    source = (ROOT / row.used_in).read_text()
    assert re.search(rf"from membership\.base\.timing import [^)]*?\b{row.name}\b", source)
    assert len(re.findall(rf"\b{row.name}\b", source)) > 1, "imported, and not used"
