"""Routed experts of a step that all ranks of a host run together: each computes those that it holds, for all of them.

Rows travel between GPUs (`workers/exchange/cuda`), so a whole step is one graph, as on a rank that holds all experts. A
rank without rows of its own computes for the others (`serve`). An expert's place in a rank's window is its number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor

from membership.base.errors import CalledOff, ModelError
from workers.exchange.cuda.calls import DeviceCalls, Failure
from workers.exchange.cuda.window import WindowShape
from workers.model.backend import HeldExperts
from workers.model.cuda.expert_products import MANY, ExpertKernels, addresses_of

log = structlog.get_logger(__name__)

MET = 3  # a step without rows is recorded when it is met so often
GIVEN_UP = Failure.ABORTED | Failure.TOO_LATE


class SharedExperts:
    """Satisfies `LocalExperts`, with the kernel and the order of sums of the other ways, so with the same bits."""

    def __init__(
        self, calls: DeviceCalls, shape: WindowShape, held: HeldExperts, kernels: ExpertKernels, layers: int
    ) -> None:
        """ModelError if `held` has nothing yet. `layers`: MoE layers, as `calls` has them."""
        self._calls, self._held, self._kernels = calls, held, kernels
        self._shape, self._layers = shape, layers
        keys = [(layer, expert) for layer in range(layers) for expert in range(shape.held)]
        some = next((held.weights(*key) for key in keys if held.holds(*key)), None)
        if some is None:
            raise ModelError("this rank holds no expert")
        self._some = some
        self._kernels.look(some.gate_up)
        device = some.gate_up.device
        self._up_at, self._down_at = torch.zeros(2, layers, shape.held, dtype=torch.int64, device=device)
        self._base = self._masked = 0
        self._few = MANY
        self._nothing = (
            torch.zeros(1, shape.hidden, dtype=torch.bfloat16, device=device),
            torch.zeros(1, shape.top_k, dtype=torch.int64, device=device),
            torch.zeros(1, shape.top_k, dtype=torch.float32, device=device),
        )
        self._served = Counter[int]()
        self._serving: dict[int, torch.cuda.CUDAGraph] = {}  # by how groups are computed, as is what was met
        self._able = True  # to record that
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()  # of all: no two run at once, and nothing of them is read

    def place(self, holders: Sequence[Sequence[int | None]]) -> None:
        """`holders[layer][expert]`: the rank that is asked for it. Those of this rank must be here. ModelError."""
        experts = range(self._shape.held)
        self._calls.place_each(
            [experts] * self._shape.ranks,
            [[None if rank is None else (rank, e) for e, rank in enumerate(layer)] for layer in holders],
        )
        for layer in range(self._layers):
            found = [self._held.weights(layer, e) if self._held.holds(layer, e) else self._some for e in experts]
            for table, matrices in (
                (self._up_at, [weights.gate_up for weights in found]),
                (self._down_at, [weights.down for weights in found]),
            ):
                table[layer].copy_(torch.tensor(addresses_of(matrices)))

    @property
    def many(self) -> bool:
        """See `LocalExperts`."""
        return self._few != MANY

    def follow(self, base: int, masked: int, rows: int) -> None:
        """The next step's calls have numbers from `base` on; these slots are neither used nor waited for. All ranks
        have so many `rows` together.
        """
        self._base, self._masked = base, masked
        self._few = self._kernels.few(rows * self._shape.top_k, self._shape.held)

    def begin(self, rows: int) -> bool:
        """See `LocalExperts`."""
        self._calls.begin(self._base, rows, self._masked)
        return True

    def compute(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See `LocalExperts`."""

        def products(packed: Tensor, ends: Tensor) -> Tensor:
            up, down = (self._some.gate_up, self._up_at[layer]), (self._some.down, self._down_at[layer])
            return self._kernels.run(packed, up, down, ends, few=self._few)

        return self._calls.call(layer, hidden, ids, weights, products)

    @torch.inference_mode()
    def serve(self) -> None:
        """A whole step without rows of this rank: what the others ask for. CalledOff."""
        self.begin(0)
        self._served[self._few] += 1
        if self._able and self._few not in self._serving and self._served[self._few] >= MET:
            self._record()
        serving = self._serving.get(self._few)
        if serving is None:
            self._compute_nothing()
        else:
            serving.replay()
        self.check()

    def _compute_nothing(self) -> None:
        for layer in range(self._layers):
            self.compute(layer, *self._nothing)

    def _record(self) -> None:
        """Keep such a step as a graph. If that cannot be, it is not tried again: peers wait for each of our steps."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(self._pool, "thread_local")  # another thread may load experts meanwhile
                try:
                    self._compute_nothing()
                finally:
                    graph.capture_end()  # after an error, too: else the stream takes nothing but what it records
            self._serving[self._few] = graph
            log.info("step_recorded", rows=0, many=self.many)
        except Exception as error:  # noqa: BLE001 - whatever it was, steps go on as before
            self._able = False
            log.warning("serving_is_not_recorded", error=repr(error))
        finally:
            here.wait_stream(self._stream)

    def check(self) -> None:
        """See `LocalExperts`. ModelError if more is wrong than that a rank has given up."""
        failure = self._calls.failure()
        if failure & ~GIVEN_UP:
            raise ModelError(f"a step of all ranks together went wrong: {failure!r}")
        if failure:
            raise CalledOff(f"a step of all ranks together was given up: {failure!r}")

    def take_load(self) -> npt.NDArray[np.uint32]:
        """See `LocalExperts`: the rows that this rank was asked to compute, so all ranks' together are all rows."""
        return self._calls.take_loads().numpy().astype(np.uint32)
