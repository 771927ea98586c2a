"""Decode steps as CUDA graphs: what the GPU does between two calls of routed experts is recorded once, then replayed.

The host takes 14 ms to launch what keeps an H200 busy for 2 ms (8 layers, one token). Routed experts stay outside:
their rows travel through host memory, to whichever ranks are there. So nothing in a graph knows of membership. Where
every rank holds all experts no rows travel, or they travel between GPUs: then a whole step is one graph. A graph of
each kind is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor

from workers.model.attention_plan import StepPlan
from workers.model.backend import LocalExperts, MoeBoundary, StepFunction
from workers.model.cuda.attention import SPLIT, CudaAttention, Layout

log = structlog.get_logger(__name__)

LARGEST = 128  # rows; larger steps keep the GPU busy for longer than they take to launch
# padded rows, splits, who computes experts on the GPU, if it stays there, and whether as for many rows of others
_Size = tuple[int, int, LocalExperts | None, bool]
MET = 3  # a size is recorded when it is met so often


@dataclass(frozen=True)
class _Segment:
    """One graph, the routed experts that follow it, and where the next graph expects their results."""

    graph: torch.cuda.CUDAGraph
    layer: int
    hidden: Tensor
    ids: Tensor
    weights: Tensor
    landing: Tensor

    def run(self, experts: MoeBoundary, rows: int) -> None:
        """Replay, and have the experts compute the first `rows` rows."""
        self.graph.replay()
        ids = self.ids[:rows].clone()  # kept for the load report, while the next step writes here
        self.landing[:rows] = experts.compute(self.layer, self.hidden[:rows], ids, self.weights[:rows])


class _Recording:
    """The graphs of steps of one size: `padded` rows of one token each, with contexts of up to `splits` splits."""

    def __init__(self, plan: StepPlan, splits: int, attention: CudaAttention, pool: Any) -> None:
        cache, rows, device = attention.cache, plan.padded, plan.tokens.device
        self._pages = -(-splits * SPLIT // cache.block_size)
        self._scratch = cache.blocks * cache.block_size  # where padding is written
        self._numbers = torch.zeros(rows * (1 + self._pages), dtype=torch.int64, device=device)
        cells, tables = self._numbers.split_with_sizes([rows, rows * self._pages])
        self.plan = replace(plan, rows=rows, tokens=plan.tokens.clone(), positions=plan.positions.clone())
        sequences = torch.arange(rows, device=device)
        tables = tables.view(rows, self._pages)
        self.layout = Layout(self.plan, cells, sequences, self.plan.positions[0], tables, splits)
        self._pool = pool
        self._segments: list[_Segment] = []
        self._graph: torch.cuda.CUDAGraph | None = None  # being recorded
        self._last: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    @property
    def broken(self) -> bool:
        """Whether an error came from the midst of a graph: there is something in a step that cannot be recorded."""
        return self._graph is not None

    def record(self, step: StepFunction, plan: StepPlan, experts: MoeBoundary) -> Tensor:
        """Run one step and keep its graphs. On a stream of its own, as recording demands."""
        self._fill(plan)

        def leave(layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            segment = _Segment(self._end(), layer, hidden, ids, weights, torch.zeros_like(hidden))
            self._segments.append(segment)
            segment.run(experts, plan.rows)
            self._begin()
            return segment.landing

        experts.leave = leave
        try:
            self._begin()
            out = step(self.plan)
            self._last = self._end(), out
        finally:
            experts.leave = None
        self._last[0].replay()
        return out

    def replay(self, plan: StepPlan, experts: MoeBoundary) -> Tensor:
        """Run one step. The result is overwritten by the next."""
        if self._last is None:
            raise RuntimeError("nothing was recorded")
        self._fill(plan)
        for segment in self._segments:
            segment.run(experts, plan.rows)
        graph, out = self._last
        graph.replay()
        return out

    def give_up(self) -> None:
        """End what is being recorded after an error."""
        graph, self._graph = self._graph, None
        if graph is not None:
            try:
                graph.capture_end()
            except RuntimeError as error:
                log.info("recording_was_void", error=str(error))

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(self._pool, "thread_local")  # another thread may load experts meanwhile

    def _end(self) -> torch.cuda.CUDAGraph:
        graph = self._graph
        if graph is None:
            raise RuntimeError("nothing is being recorded")
        graph.capture_end()
        self._graph = None
        return graph

    def _fill(self, plan: StepPlan) -> None:
        """Put this step's numbers where the graphs read them, in one copy from the host that it does not wait for."""
        rows = plan.padded
        cells = np.full(rows, self._scratch, dtype=np.int64)
        cells[: plan.rows] = plan.cells
        tables = np.zeros((rows, self._pages), dtype=np.int64)
        for row, blocks in zip(tables, plan.tables, strict=False):
            used = blocks[: self._pages]
            row[: len(used)] = used
        numbers = torch.from_numpy(np.concatenate((cells, tables.reshape(-1)))).pin_memory()
        self._numbers.copy_(numbers, non_blocking=True)
        self.plan.tokens.copy_(plan.tokens)
        self.plan.positions.copy_(plan.positions)


class StepGraphs:
    """A step function that records decode steps of each size when it has met it a few times."""

    def __init__(
        self,
        step: StepFunction,
        attention: CudaAttention,
        experts: MoeBoundary,
        on_recorded: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._step = step
        self._on_recorded = on_recorded
        self._attention = attention
        self._experts = experts
        self._met: Counter[_Size] = Counter()
        self._recorded: dict[_Size, _Recording] = {}
        self._able = True
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()  # of all: no two run at once, only the last result is read

    def __call__(self, plan: StepPlan) -> Tensor:
        """Hidden states [plan.padded, H]; overwritten by the next call. What the exchange raises, it raises."""
        if not self._able or plan.padded > LARGEST or plan.rows != len(plan.last):
            return self._step(plan)
        splits = -(-(max(plan.starts) + 1) // SPLIT)
        experts = self._experts.on_device
        many = experts is not None and experts.many
        size = plan.padded, 1 << (splits - 1).bit_length(), experts, many
        known = self._recorded.get(size)
        if known is not None:
            return known.replay(plan, self._experts)
        self._met[size] += 1
        return self._record(plan, size) if self._met[size] >= MET else self._step(plan)

    def _record(self, plan: StepPlan, size: _Size) -> Tensor:
        recording = _Recording(plan, size[1], self._attention, self._pool)
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream), self._attention.holding(recording.layout):
                out = recording.record(self._step, plan, self._experts)
        except Exception as error:
            if not recording.broken:
                raise  # the exchange's
            self._able = False
            log.warning("steps_are_not_recorded", error=repr(error), padded=size[0])
            recording.give_up()
            return self._step(plan)
        finally:
            here.wait_stream(self._stream)
        self._recorded[size] = recording
        self._on_recorded(size[0])
        log.info("step_recorded", rows=size[0], splits=size[1], whole=self._experts.on_device is not None)
        return out
