"""What a rank answers may be read from its memory once it is dead: so it answers only when its device has written it.

A device that has a queue of its own is pretended: what is launched counts as done once it was waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from elastic.demo.model import write_demo_model
from tests.support.model_helpers import make_runner
from workers.model import runner as module
from workers.model.attention_plan import StepPlan
from workers.model.runner import ModelRunner
from workers.protocol.messages import Sampling, SeqChunk

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRunner]:
    path = tmp_path_factory.mktemp("model") / "demo"
    write_demo_model(path)
    made = make_runner(path)
    yield made
    made.close()


@pytest.fixture
def queue(loaded: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is launched and not done."""
    launched: list[str] = []
    forward = loaded._forward

    def noting(plan: StepPlan) -> Tensor:
        launched.append("a step")
        return forward(plan)

    monkeypatch.setattr(loaded, "_forward", noting)
    monkeypatch.setattr(loaded._backend, "finish", launched.clear)
    return launched


@pytest.mark.parametrize("sample", [None, Sampling(temperature=0.0)], ids=["amid a prompt", "at its end"])
def test_a_step_is_answered_once_it_is_written(loaded: ModelRunner, queue: list[str], sample: Sampling | None) -> None:
    loaded.run([SeqChunk(0, 0, [5, 6, 7], [1], sample=sample)])
    assert queue == []


@pytest.mark.parametrize("how", ["take_in", "read_in", "fetch_in"])
def test_blocks_that_have_come_are_told_once_they_are_written(
    loaded: ModelRunner, queue: list[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def launched(*_: Any) -> int:
        queue.append("a copy")
        return 1

    monkeypatch.setattr(module, how, launched)
    arguments: dict[str, tuple[Any, ...]] = {
        "take_in": ([1], memoryview(b""), (1, 2)), "read_in": ([1], 0, [2]), "fetch_in": ([1], None, [2]),
    }  # fmt: skip
    assert getattr(loaded, how)(*arguments[how]) == 1
    assert queue == []
