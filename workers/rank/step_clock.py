"""How long a step took on this rank, and how much of that in its exchange. Only steps that are traced have one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.moe import Dispatcher
    from workers.model.runner import ModelRunner
    from workers.protocol.messages import SampledToken, SeqChunk


class StepClock:
    """Between the model and the exchange, for one step."""

    def __init__(self, exchange: Dispatcher, clock: Callable[[], float] = time.monotonic) -> None:
        self.took_s = self.exchange_s = 0.0
        self._exchange, self._clock = exchange, clock

    def run(self, runner: ModelRunner, chunks: list[SeqChunk], *, together: bool = False) -> list[SampledToken]:
        """Run the step, and take its time. Afterwards the runner uses the exchange directly again.

        Of a step of all ranks together no time is known to be the exchange's.
        """
        began = self._clock()
        runner.attach(self)
        try:
            return runner.run(chunks, together=together)
        finally:
            runner.attach(self._exchange)
            self.took_s = self._clock() - began

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """As the exchange's."""
        began = self._clock()
        try:
            return self._exchange.dispatch_combine(layer, hidden, topk_ids, topk_weights)
        finally:
            self.exchange_s += self._clock() - began

    def stays(self) -> bool:
        """As the exchange's: then nothing is spent there."""
        return self._exchange.stays()
