"""Steps that a new rank has recorded before it serves: all sizes, without a peer, and nothing of it is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from elastic.demo.model import write_demo_model
from tests.support.model_helpers import make_runner
from workers.model.attention_plan import StepPlan
from workers.model.expert_source import ExpertWeights
from workers.model.runner import REHEARSED_ROWS, REHEARSED_STARTS, REHEARSED_TIMES, ModelRunner

pytestmark = pytest.mark.unit

EVERY = len(REHEARSED_ROWS) * len(REHEARSED_STARTS) * REHEARSED_TIMES


class Here:
    """All experts on this device, which are cheap."""

    def __init__(self) -> None:
        self.ready, self.taken = False, 0

    def begin(self, rows: int) -> bool:
        return self.ready

    def compute(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros_like(hidden)

    @contextmanager
    def pretending(self, some: ExpertWeights) -> Iterator[None]:
        self.ready = True
        yield
        self.ready = False

    def check(self) -> None:
        """Nothing is wrong."""

    def take_load(self) -> npt.NDArray[np.uint32]:
        self.taken += 1
        return np.zeros((1, 1), dtype=np.uint32)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRunner]:
    path = tmp_path_factory.mktemp("model") / "demo"
    write_demo_model(path)
    made = make_runner(path)
    yield made
    made.close()


@pytest.fixture
def runner(loaded: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    """On a backend that records, as far as the runner knows."""
    monkeypatch.setattr(loaded._backend, "records", True)
    monkeypatch.setattr(loaded.moe, "local", Here())
    return loaded


def test_every_size_is_met_as_often_as_it_takes(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward, exchange = Counter[tuple[int, int]](), runner._forward, runner.moe.exchange

    def noting(plan: StepPlan) -> Tensor:
        seen[plan.rows, max(plan.starts)] += 1
        return forward(plan)

    monkeypatch.setattr(runner, "_forward", noting)
    assert runner.rehearse(lambda: False) == EVERY
    assert set(seen) == {(rows, start) for rows in REHEARSED_ROWS for start in REHEARSED_STARTS}
    assert set(seen.values()) == {REHEARSED_TIMES}
    assert runner.moe.exchange is exchange, "steps go to peers again"
    assert not runner.moe.local.ready, "and nothing is pretended"  # type: ignore[union-attr]
    assert runner._done is None, "the first real step builds on none of them"
    assert runner.moe.local is not None
    assert runner.moe.local.taken == 1, "made-up tokens are no load"  # type: ignore[attr-defined]


def test_it_ends_when_its_time_is_up(runner: ModelRunner) -> None:
    looks = iter([False, False, True])
    assert runner.rehearse(lambda: next(looks)) == 2


@pytest.mark.parametrize("why", ["a backend that records nothing", "no such experts"])
def test_without_graphs_nothing_is_run(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "no such experts":
        monkeypatch.setattr(runner.moe, "local", None)
    else:
        monkeypatch.setattr(runner._backend, "records", False)
    assert runner.rehearse(lambda: False) == 0
