"""Steps over GPUs of a rank without rows, as far as that needs no GPU: what becomes of them if none can be recorded."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from enum import IntFlag
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.unit


class Failure(IntFlag):
    ABORTED = 1
    TOO_LATE = 2


class Graph:
    """Of torch.cuda: it is told what is recorded."""

    ended = 0

    def capture_begin(self, capture_error_mode: str) -> None:
        pass

    def capture_end(self) -> None:
        Graph.ended += 1


def test_where_a_step_cannot_be_recorded_it_is_tried_once_and_steps_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = SimpleNamespace(DeviceCalls=object, Failure=Failure)
    monkeypatch.setitem(sys.modules, "workers.exchange.cuda.calls", calls)
    products = SimpleNamespace(addresses_of=None, multiply=None)
    monkeypatch.setitem(sys.modules, "workers.model.cuda.expert_products", products)
    monkeypatch.delitem(sys.modules, "workers.model.cuda.shared_experts", raising=False)
    shared_experts: Any = importlib.import_module("workers.model.cuda.shared_experts")
    del sys.modules["workers.model.cuda.shared_experts"]  # others are to get one with the real kernels
    stream = SimpleNamespace(wait_stream=lambda other: None)
    recorded: list[object] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)

    def record(on: object) -> Any:
        recorded.append(on)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "stream", record)
    rank: Any = object.__new__(shared_experts.SharedExperts)
    begun: list[int] = []
    rank._calls = SimpleNamespace(begin=lambda base, rows, masked: begun.append(rows), failure=lambda: Failure(0))
    rank._base = rank._masked = rank._served = 0
    rank._serving, rank._able, rank._stream, rank._layers, rank._nothing = None, True, stream, 2, ()
    ran: list[int] = []

    def compute(layer: int) -> None:
        if len(recorded) > Graph.ended:
            raise RuntimeError("operation not permitted when stream is capturing")
        ran.append(layer)

    rank.compute = compute
    for _ in range(shared_experts.MET + 2):
        rank.serve()
    assert ran == [0, 1] * len(begun), "each step was computed"
    assert (len(recorded), Graph.ended) == (1, 1)
