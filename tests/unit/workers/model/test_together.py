"""A step that all ranks run together: its experts are the shared ones, and what was called off is no result."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch
from torch import Tensor

from elastic.demo.model import shipped_demo_model
from membership.base.errors import CalledOff, ModelError
from tests.support.model_helpers import make_runner
from workers.model.runner import ModelRunner
from workers.protocol.messages import Sampling, SeqChunk

pytestmark = pytest.mark.unit


class Shared:
    """Satisfies `LocalExperts` with this rank's exchange; gives steps up on demand."""

    def __init__(self, runner: ModelRunner) -> None:
        assert runner.moe.exchange is not None
        self.exchange = runner.moe.exchange
        self.layers, self.experts = runner.moe.take_load().shape
        self.off, self.rows = False, list[int]()

    def begin(self, rows: int) -> bool:
        self.rows.append(rows)
        return True

    def compute(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = self.exchange.dispatch_combine(layer, hidden, ids, weights)
        return out.fill_(float("nan")) if self.off else out

    def check(self) -> None:
        if self.off:
            raise CalledOff("the other one died")

    def take_load(self) -> np.ndarray:
        return np.ones((self.layers, self.experts), np.uint32)


def test_a_step_together_gives_the_same_tokens_and_one_that_is_called_off_none() -> None:
    with closing(make_runner(shipped_demo_model())) as runner:
        _run(runner)


def _run(runner: ModelRunner) -> None:
    prompt = SeqChunk(1, 0, [5, 6, 7, 8], [0], Sampling())
    alone = [runner.run([prompt])[0].token]
    decode = SeqChunk(1, 4, [alone[0]], [0], Sampling())
    alone += [runner.run([decode])[0].token]
    with pytest.raises(ModelError, match="does not reach the others' GPUs"):
        runner.run([decode], together=True)
    runner.moe.shared = shared = Shared(runner)
    shared.off = True
    with pytest.raises(CalledOff):
        runner.run([decode], together=True)
    shared.off = False
    assert runner.run([decode], together=True)[0].token == alone[1]
    assert shared.rows == [1, 1]
    assert runner.run([decode])[0].token == alone[1]
    assert shared.rows == [1, 1], "that one was not together"
    assert torch.from_numpy(runner.moe.take_load().astype(np.int64)).min() >= 1, "those that came from others count"
