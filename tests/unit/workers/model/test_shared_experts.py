"""Steps over GPUs of a rank without rows, as far as that needs no GPU: what becomes of them if none can be recorded."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from enum import IntFlag
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from workers.exchange.cuda.window import WindowShape

pytestmark = pytest.mark.unit


class Failure(IntFlag):
    ABORTED = 1
    TOO_LATE = 2


class Graph:
    """Of torch.cuda: it is told what is recorded, and in whose memory."""

    ended, replayed = 0, 0
    pools: ClassVar[list[object]] = []

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        Graph.pools.append(pool)

    def capture_end(self) -> None:
        Graph.ended += 1

    def replay(self) -> None:
        Graph.replayed += 1


class Rank:
    """One without rows, without a GPU. `recorded`: its streams of recordings, as often as one began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = SimpleNamespace(DeviceCalls=object, Failure=Failure)
        monkeypatch.setitem(sys.modules, "workers.exchange.cuda.calls", calls)
        products = SimpleNamespace(addresses_of=None, ExpertKernels=object, MANY=1 << 30)
        monkeypatch.setitem(sys.modules, "workers.model.cuda.expert_products", products)
        monkeypatch.delitem(sys.modules, "workers.model.cuda.shared_experts", raising=False)
        self.module: Any = importlib.import_module("workers.model.cuda.shared_experts")
        del sys.modules["workers.model.cuda.shared_experts"]  # others are to get one with the real kernels
        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.recorded: list[object] = []
        Graph.ended, Graph.replayed, Graph.pools = 0, 0, []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "stream", self.record)
        weights = SimpleNamespace(gate_up=torch.zeros(2), down=None)
        held: Any = SimpleNamespace(weights=lambda layer, expert: weights, holds=lambda layer, expert: True)
        self.begun: list[int] = []
        self.calls: Any = SimpleNamespace(
            begin=lambda base, rows, masked: self.begun.append(rows), failure=lambda: Failure(0)
        )
        self.kernels: Any = SimpleNamespace(look=lambda up: None, few=lambda rows, groups: 32 if rows else 1 << 30)
        self.experts = self.module.SharedExperts(self.calls, WindowShape(2, 4, 8, 16, 2), held, self.kernels, 2)
        self.ran: list[int] = []
        monkeypatch.setattr(self.experts, "compute", self.compute)

    def record(self, on: object) -> Any:
        self.recorded.append(on)
        return nullcontext()

    def compute(self, layer: int, *nothing: object) -> None:
        self.ran.append(layer)


def test_where_a_step_cannot_be_recorded_it_is_tried_once_and_steps_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch)

    def compute(layer: int, *nothing: object) -> None:
        if len(rank.recorded) > Graph.ended:
            raise RuntimeError("operation not permitted when stream is capturing")
        rank.ran.append(layer)

    monkeypatch.setattr(rank.experts, "compute", compute)
    for _ in range(rank.module.MET + 2):
        rank.experts.serve()
    assert rank.ran == [0, 1] * len(rank.begun), "each step was computed"
    assert (len(rank.recorded), Graph.ended) == (1, 1)


def test_all_that_is_recorded_shares_the_memory_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for all ranks' rows in each, gigabytes for large models; no two run at once."""
    rank = Rank(monkeypatch)
    for rows in (0, 64):  # those of the other ranks, which decide the tiles
        for _ in range(rank.module.MET + 2):
            rank.experts.follow(1, 0, rows)
            rank.experts.serve()
    assert (len(Graph.pools), len(set(Graph.pools))) == (2, 1)
    assert Graph.replayed == 2 * 3, "the one in which it was recorded, too"
