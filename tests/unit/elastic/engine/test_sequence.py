"""What a request is before it has a home, and once it has left one."""

from __future__ import annotations

import pytest

from elastic.engine.kv_blocks import BlockPool
from elastic.engine.sequence import Home, Sequence
from tests.support.rank_model import ask

pytestmark = pytest.mark.unit


def test_a_new_request_has_computed_nothing_and_waited_for_nothing() -> None:
    new = Sequence.of(ask("r", [5, 6, 7]), 1, 0.0)
    assert (new.home, new.computed, new.remaining, new.queued_s, new.failures) == (None, 0, 3, 0.0, 0)


def test_a_request_that_leaves_its_home_begins_anew() -> None:
    pool = BlockPool(8, 4)
    home, left = Home(0, 10, pool), Sequence.of(ask("r", [5, 6, 7]), 1, 0.0)
    left.enter(home, pool.take(2), cached=1, now=2.5)
    left.failures, left.stalled_since, left.guest = 2, 3.0, True
    left.leave()
    assert (left.home, left.computed, left.failures, left.stalled_since, left.guest) == (None, 0, 0, None, False)
    assert (home.running, pool.used, left.blocks) == ([], 0, [])
    assert (left.cached, left.queued_s) == (1, 2.5), "they are of its first home"
