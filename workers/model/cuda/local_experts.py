"""Routed experts of a rank that holds them all: which rows are for which expert is found on the GPU.

So the host neither waits for a layer's routing nor launches per layer, and a whole step is one graph. Where experts lie
is read from a table in the GPU's memory, which is written anew when experts come or go.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from workers.model.backend import HeldExperts
from workers.model.cuda.expert_products import ExpertKernels, Picked, addresses_of
from workers.model.cuda.kernels import group_pairs, weighted_sum

PAIRS = 1024  # of a token and one of its experts, looked at together
COLUMNS = 512  # of a sum per program


class CudaLocalExperts:
    """Satisfies `LocalExperts`, with the kernel and the sum of the other way, so with the same bits."""

    many = False  # how a call is computed depends on its own rows alone

    def __init__(self, held: HeldExperts, kernels: ExpertKernels, shape: tuple[int, int], device: torch.device) -> None:
        """`shape`: MoE layers, experts."""
        self._held = held
        self._kernels = kernels
        self._layers, self._experts = shape
        self._seen = -1  # the version of `held` that the tables are of
        self._complete = False
        self._up = self._down = torch.empty(0)  # one expert's: all are laid out alike
        self._up_at, self._down_at = torch.zeros(2, *shape, dtype=torch.int64, device=device)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._rows = torch.zeros(1, dtype=torch.int32, device=device)
        self._numbers = torch.empty(0, dtype=torch.int32, device=device)  # what is made of it has type and place

    def begin(self, rows: int) -> bool:
        """See `LocalExperts`."""
        version = self._held.version
        if version != self._seen:
            self._seen, self._complete = version, self._renew()
        if self._complete:
            self._rows.fill_(rows)
        return self._complete

    def _renew(self) -> bool:
        keys = [(layer, expert) for layer in range(self._layers) for expert in range(self._experts)]
        found = [self._held.weights(*key) for key in keys if self._held.holds(*key)]
        if len(found) < len(keys):
            return False
        self._up, self._down = found[0].gate_up, found[0].down
        self._kernels.look(self._up)
        for table, matrices in (
            (self._up_at, [weights.gate_up for weights in found]),
            (self._down_at, [weights.down for weights in found]),
        ):
            table.copy_(torch.tensor(addresses_of(matrices)).view_as(table))
        return True

    def compute(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See `LocalExperts`."""
        (tokens, k), width = ids.shape, hidden.shape[1]
        ids, weights = ids.contiguous(), weights.contiguous()
        pairs, places = self._numbers.new_empty(2, tokens * k)
        ends = self._numbers.new_empty(self._experts + 1)
        group_pairs[(self._experts,)](
            ids, self._rows, pairs, places, ends, self._counts[layer], tokens * k, K=k, PAIRS=PAIRS
        )
        few = self._kernels.few(tokens * k, self._experts)
        up, down = (self._up, self._up_at[layer]), (self._down, self._down_at[layer])
        parts = self._kernels.run(hidden, up, down, ends, Picked(pairs, k), few)
        total = torch.empty_like(hidden)
        weighted_sum[(tokens, triton.cdiv(width, COLUMNS))](
            parts, ids, weights, places, self._rows, total, width,
            K=k, WIDE_K=triton.next_power_of_2(k), COLUMNS=COLUMNS, enable_fp_fusion=False,
        )  # fmt: skip
        return total

    def check(self) -> None:
        """Nothing can go wrong with them."""

    def take_load(self) -> npt.NDArray[np.uint32]:
        """See `LocalExperts`."""
        counts = self._counts.cpu().numpy().astype(np.uint32)
        self._counts.zero_()
        return counts
