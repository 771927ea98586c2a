"""The product's worker, which also tells where the time of its decode steps goes; `RECOVERY_WORKER` names it.

A log line `steps_timed` for so many steps of a size in a row, in milliseconds, medians and 98th percentiles:

    between   from a step's end on this rank until the next one begins: engine, queues, and waiting for other ranks
    run       the step on this rank, until its tokens are in host memory
    device    its hidden states, as the GPU's clock has them (on a CPU, the host's)

So a token takes `between` + `run`, and what is beyond `device` of it is the host's (and the head's and sampler's).
"""

from __future__ import annotations

import time
from statistics import median, quantiles
from typing import Any, NamedTuple

import structlog

from membership.base.enums import Device
from workers.protocol.messages import StepBatch, StepResult
from workers.rank.worker import EPWorker

TOLD = 100  # steps
log = structlog.get_logger(__name__)


class _Step(NamedTuple):
    between: float
    run: float
    device: float


class TimedWorker(EPWorker):
    """See workers.rank.worker."""

    def load_model(self) -> None:
        """The model, and a clock around its forward pass."""
        super().load_model()
        self._size, self._ended, self._took = 0, 0.0, 0.0
        self._steps: list[_Step] = []
        runner: Any = self._runner
        forward = runner._forward
        if self._backend is None or self._backend.device.type != Device.CUDA:
            runner._forward = self._timed(forward)
            return
        import torch

        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        runner._forward = self._timed_there(forward)

    def _timed(self, forward: Any) -> Any:
        def run(plan: Any) -> Any:
            began = time.monotonic()
            out = forward(plan)
            self._took = 1000 * (time.monotonic() - began)
            return out

        return run

    def _timed_there(self, forward: Any) -> Any:
        def run(plan: Any) -> Any:
            self._events[0].record()
            out = forward(plan)
            self._events[1].record()
            return out

        return run

    def execute_model(self, batch: StepBatch) -> StepResult | None:
        """The step, and its time."""
        began = time.monotonic()
        result = super().execute_model(batch)
        ended, chunks = time.monotonic(), batch.ranks.get(self.rank) or []
        rows = len(chunks) if all(len(chunk.tokens) == 1 for chunk in chunks) else 0
        if rows != self._size:
            self._tell()
            self._size = rows
        elif rows and result is not None:
            if self._backend is not None and self._backend.device.type == Device.CUDA:
                self._took = self._events[0].elapsed_time(self._events[1])
            self._steps.append(_Step(1000 * (began - self._ended), 1000 * (ended - began), self._took))
            if len(self._steps) == TOLD:
                self._tell()
        self._ended = ended
        return result

    def _tell(self) -> None:
        steps, self._steps = self._steps, []
        if len(steps) < TOLD // 2:
            return
        found = {
            name: [round(median(values), 3), round(quantiles(values, n=50)[-1], 3)]
            for name, values in zip(_Step._fields, zip(*steps, strict=True), strict=True)
        }
        log.info("steps_timed", rank=self.rank, rows=self._size, steps=len(steps), **found)
