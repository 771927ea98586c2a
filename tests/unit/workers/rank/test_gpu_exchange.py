"""A rank's part in steps over GPUs, as far as it needs none: whom it asks, and that what it cannot is a reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from membership.store.records import View
from tests.support.rank_model import config
from workers.protocol.messages import StepBatch
from workers.rank.gpu_exchange import Apart, GpuExchange, holders_of

pytestmark = pytest.mark.unit

PLACED = {0: ((0, 1), (0,)), 1: ((1, 2), (1, 2)), 2: ((1,), (0, 2))}


def test_a_rank_asks_itself_first_and_the_others_by_turns() -> None:
    assert holders_of(PLACED, {0, 1, 2}, 1, (2, 3)) == [[0, 1, 1], [2, 1, 1]]
    assert holders_of(PLACED, {0, 1, 2}, 0, (2, 3)) == [[0, 0, 1], [0, 1, 1]]


def test_a_rank_that_is_not_live_is_not_asked_and_what_nobody_has_is_nowhere() -> None:
    assert holders_of(PLACED, {0, 2}, 2, (2, 3)) == [[0, 2, None], [2, None, 2]]
    assert holders_of({}, {0}, 0, (1, 2)) == [[None, None]]


def test_without_a_gpu_it_says_why() -> None:
    ctx: Any = SimpleNamespace(rank=0, config=config(gpu_exchange=2))
    exchange, step = GpuExchange(ctx), StepBatch(1, 1, 1, 0, [], {0: [], 1: []}, together=5)
    with pytest.raises(Apart, match="has not prepared"):
        exchange.begin(View(epoch=1), step)
    backend = SimpleNamespace(device=torch.device("cpu"))
    loaded = SimpleNamespace(backend=backend, info=SimpleNamespace(top_k=2))
    runner: Any = SimpleNamespace(loaded=loaded, dtype=torch.bfloat16, moe=SimpleNamespace(shared=None))
    exchange.open(runner)
    with pytest.raises(Apart, match=r"rank 0: rows travel between GPUs in bfloat16, not torch\.bfloat16 on cpu"):
        exchange.begin(View(epoch=1), step)
    assert runner.moe.shared is None
