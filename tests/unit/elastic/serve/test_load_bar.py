"""What `elastic serve` shows of loads, and when one of them counts as progress of its start."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from elastic.serve.load_bar import LoadBar, RankLoad
from elastic.serve.supervisor import Readiness

pytestmark = pytest.mark.unit


def test_a_start_advances_only_with_bytes() -> None:
    none, some, more = Readiness(), Readiness(loads=(RankLoad(0, 5, 9),)), Readiness(loads=(RankLoad(0, 6, 9),))
    assert some.advanced(none)
    assert more.advanced(some)
    assert not some.advanced(some)
    assert not none.advanced(some), "its load is over: what follows has a deadline again"
    assert not Readiness(loads=(RankLoad(1, 0, 9),)).advanced(none)


def test_a_terminal_shows_a_bar_per_rank_and_anything_else_nothing() -> None:
    terminal, pipe = Console(file=io.StringIO(), force_terminal=True, width=100), Console(file=io.StringIO())
    for console in (terminal, pipe):
        with LoadBar(console) as bar:
            bar.show((RankLoad(0, 500_000, 2_000_000), RankLoad(1, 0, 2_000_000)))
            bar.show((RankLoad(1, 1_000_000, 2_000_000),))
            bar._bars.refresh()
    assert pipe.file.getvalue() == ""  # type: ignore[attr-defined]
    drawn = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "rank 1" in drawn
    assert "1.0/2.0 MB" in drawn
