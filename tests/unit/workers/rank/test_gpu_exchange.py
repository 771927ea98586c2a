"""A rank's part in steps over GPUs, as far as it needs none: whom it asks, and that what it cannot is a reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from membership.store.records import Member, View
from tests.support.rank_model import config
from workers.exchange.cuda.compiler import LAYOUT
from workers.exchange.cuda.window import WindowShape
from workers.protocol.messages import StepBatch
from workers.protocol.window_client import WindowAsked
from workers.rank.gpu_exchange import Apart, GpuExchange, holders_of

pytestmark = pytest.mark.unit

PLACED = {0: ((0, 1), (0,)), 1: ((1, 2), (1, 2)), 2: ((1,), (0, 2))}


def test_a_rank_asks_itself_first_and_the_others_by_turns() -> None:
    assert holders_of(PLACED, {0, 1, 2}, 1, (2, 3)) == [[0, 1, 1], [2, 1, 1]]
    assert holders_of(PLACED, {0, 1, 2}, 0, (2, 3)) == [[0, 0, 1], [0, 1, 1]]


def test_a_rank_that_is_not_live_is_not_asked_and_what_nobody_has_is_nowhere() -> None:
    assert holders_of(PLACED, {0, 2}, 2, (2, 3)) == [[0, 2, None], [2, None, 2]]
    assert holders_of({}, {0}, 0, (1, 2)) == [[None, None]]


def view_of(*nodes: str) -> View:
    """A rank on each of these."""
    members = tuple(Member(rank=rank, incarnation=9, node=node) for rank, node in enumerate(nodes))
    return View(epoch=1, members=members)


def test_a_second_try_goes_on_where_the_first_one_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes a page once only. What comes after it may fail for a moment, for want of memory."""
    pages: list[int] = []
    failures = [RuntimeError("no memory")]
    made = SimpleNamespace()

    def host_words(page: int, nbytes: int) -> int:
        assert page not in pages, "CUDA's driver: CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
        pages.append(page)
        return 1 << 40

    def calls(*given: Any) -> Any:
        if failures:
            raise failures.pop()
        made.reach = given[3]
        return made

    driver = SimpleNamespace(host_words=host_words)
    reach = lambda windows, called_off: SimpleNamespace(windows=windows, called_off=called_off)  # noqa: E731
    monkeypatch.setitem(sys.modules, "workers.exchange.cuda.driver", driver)
    monkeypatch.setitem(sys.modules, "workers.exchange.cuda.calls", SimpleNamespace(DeviceCalls=calls, Reach=reach))
    shared = SimpleNamespace(SharedExperts=lambda given, *_: given)
    monkeypatch.setitem(sys.modules, "workers.model.cuda.shared_experts", shared)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("workers.model.moe.activation_of", lambda module: None)
    monkeypatch.setattr(GpuExchange, "_window", lambda self, slot, shape, gpu: SimpleNamespace(address=slot))
    ctx: Any = SimpleNamespace(rank=0, config=config(gpu_exchange=2), called_off_at=(7 << 12) + 2048)
    backend = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
    info = SimpleNamespace(top_k=2, moe_layers=2)
    loaded = SimpleNamespace(backend=backend, info=info, model=model, expert_modules=[None])
    moe, products = SimpleNamespace(shared=None), SimpleNamespace(kernels=None)
    runner: Any = SimpleNamespace(loaded=loaded, dtype=torch.bfloat16, moe=moe, bank=None, products=products)
    exchange = GpuExchange(ctx)
    exchange.open(runner)
    assert moe.shared is None
    exchange.open(runner)
    assert moe.shared is made
    assert (made.reach.windows, made.reach.called_off) == ([0, 1], (1 << 40) + 2048)
    said = [exchange.refusal(view_of(*nodes)) for nodes in ((), ("a",), ("a", "a"), ("a", "a", "a"), ("a", "b"))]
    assert said[:3] == ["", "", ""]
    assert said[3:] == ["rank 2 serves, too, and --gpu-exchange 2 is for ranks 0 to 1", "ranks are on 2 hosts"]


def test_a_rank_of_other_code_asks_for_windows_of_another_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent refuses those that are there: their rows would be read in other places."""
    asked: list[WindowAsked] = []

    @contextmanager
    def window_of(handle: bytes, wanted: WindowAsked, make: object) -> Iterator[tuple[int, int]]:
        asked.append(wanted)
        yield 7, 4096

    driver = SimpleNamespace(Mapping=lambda *given: given)
    monkeypatch.setitem(sys.modules, "workers.exchange.cuda.driver", driver)
    monkeypatch.setattr("workers.rank.gpu_exchange.window_of", window_of)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    exchange = GpuExchange(cast("Any", SimpleNamespace(rank=0, config=config(gpu_exchange=2), windows=b"")))
    shape = WindowShape(2, 4, 8, 16, 2)
    for edited in ("", "", *LAYOUT):
        for name in LAYOUT:
            text = files("workers.exchange.cuda").joinpath(name).read_bytes()
            (tmp_path / name).write_bytes(text + b"\n" * (name == edited))
        monkeypatch.setattr("workers.exchange.cuda.compiler.files", lambda package: tmp_path)
        exchange._window(1, shape, 0)
    assert asked[0].shape == asked[1].shape
    assert len({each.shape for each in asked}) == 3
    assert repr(shape) in asked[0].shape


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
