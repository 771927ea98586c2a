"""One rank's calls of its and its peers' experts over windows, all on the GPU: may be captured in a graph.

What changes between steps is in memory that the kernels read (numbers, mask, placement), so a graph outlives changes
of membership. The host sets it before an attempt (`begin`) and looks at the end whether the attempt failed
(`failure`). Then every live rank runs the step again, with a larger base; the unit of retry is the step.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag

import torch
from torch import Tensor

from membership.base.errors import ConfigError
from workers.exchange.cuda.compiler import NAMES, compiled
from workers.exchange.cuda.driver import launcher
from workers.exchange.cuda.window import MOST_RANKS, WindowShape

THREADS = 256
WORD_STRIDE = 16  # words: each has a line of the cache of its own
NO_PLACE = -1  # of an expert without a replica, and of a place without an expert
Compute = Callable[[Tensor, Tensor], Tensor]
"""Rows [room, H] packed by place, and where each place's begin [held + 1] -> their outputs [room, H]."""


class Failure(IntFlag):
    """Why an attempt's results are worth nothing."""

    ABORTED = 1  # the host said so
    TOO_LATE = 2  # a wait passed its limit
    OVERTAKEN = 4  # a peer is in a later call than it can be in
    UNCOVERED = 8  # an expert that no live rank holds, or that is none
    TOO_MANY = 16  # more rows for an expert than the step has


@dataclass(frozen=True)
class Reach:
    """What a rank's kernels reach of others: each slot's window, and the host's word below which calls are over."""

    windows: Sequence[int]
    called_off: int


class DeviceCalls:
    """Of one rank, on the current GPU."""

    def __init__(
        self, shape: WindowShape, me: int, experts: int, reach: Reach, limit_s: float, layers: int = 1
    ) -> None:
        """`limit_s`: how long a call waits for peers at most. `layers` that differ in where experts are; 1: none do."""
        self._shape, self._me, self._experts, self._limit_ns = shape, me, experts, int(limit_s * 1e9)
        self._windows = [*reach.windows, *[0] * (MOST_RANKS - len(reach.windows))]
        self._called_off = reach.called_off
        self._device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(self._device)
        cubin = compiled(shape, f"sm_{major}{minor}{'a' if major >= 9 else ''}")
        self._launch = {name: launcher(cubin, name) for name in NAMES}
        places = shape.ranks * shape.held
        self._words = self._numbers(4, WORD_STRIDE, kind=torch.int64)
        self._where = self._numbers(layers, experts, kind=torch.int64) + NO_PLACE
        self._loads = self._numbers(layers, shape.held, kind=torch.int64)
        self._held = self._numbers(places, kind=torch.int64) + NO_PLACE
        self._real = self._numbers(1)
        self._ends = self._numbers(shape.held + 1)
        self._starts, self._sizes, self._firsts = self._numbers(3, places)
        self._row_of = self._numbers(shape.rows * shape.top_k)
        self._packed = torch.zeros(shape.room, shape.hidden, dtype=torch.bfloat16, device=self._device)

    def _numbers(self, *sizes: int, kind: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(sizes, dtype=kind, device=self._device)

    def place(self, held: Sequence[Sequence[int]], where: Sequence[tuple[int, int] | None]) -> None:
        """`held[rank][place]`: the expert there, or NO_PLACE; `where[expert]`: rank and place of the replica in use."""
        self.place_each(held, [where] * len(self._where))

    def place_each(self, held: Sequence[Sequence[int]], where: Sequence[Sequence[tuple[int, int] | None]]) -> None:
        """The same with a `where` for each layer."""
        codes = [[NO_PLACE if at is None else at[0] << 32 | at[1] for at in layer] for layer in where]
        self._held.copy_(torch.tensor([expert for places in held for expert in places]))
        self._where.copy_(torch.tensor(codes))

    def begin(self, base: int, rows: int, masked: int = 0) -> None:
        """Before an attempt of `rows` real rows. `base` is above any number of a call before it, on every rank."""
        self._words[:, 0].copy_(torch.tensor([base, masked, 0, 0]))
        self._real.fill_(rows)

    def failure(self) -> Failure:
        """Of the attempt so far; 0: none. Waits for the kernels."""
        return Failure(int(self._words[2, 0].item()))

    def take_loads(self) -> Tensor:
        """Rows that this rank was asked to compute, [layers, held], since the last call; on the host."""
        found = self._loads.cpu()
        self._loads.zero_()
        return found

    def call(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, compute: Compute) -> Tensor:
        """The routed part of a layer: hidden [T, H], ids [T, k] int64 and weights [T, k] fp32 -> [T, H].

        Zeros past the real rows, and everywhere once the attempt has failed. Launches alone; waits for no kernel.
        """
        tokens, shape, out = len(hidden), self._shape, torch.empty_like(hidden)
        fits = tokens <= shape.rows and hidden.shape[1:] == (shape.hidden,) and ids.shape == (tokens, shape.top_k)
        if not fits or weights.shape != ids.shape or hidden.dtype != torch.bfloat16 or ids.dtype != torch.int64:
            asked = f"{tuple(hidden.shape)} of {hidden.dtype} to experts {tuple(ids.shape)}"
            raise ConfigError(f"a call of rows {asked}: windows are for {shape.rows} of {shape.hidden} bfloat16")
        given = (layer, hidden.contiguous(), ids.contiguous(), weights.float().contiguous(), out)
        stream = torch.cuda.current_stream().cuda_stream
        asking = self._arguments(*given, self._packed)
        self._launch["dispatch"](shape.ranks * shape.held, THREADS, stream, asking)
        self._launch["collect"](shape.held + 1, THREADS, stream, asking)
        computed = compute(self._packed, self._ends).contiguous()
        summing = self._arguments(*given, computed)
        self._launch["reply"](shape.ranks * shape.held, THREADS, stream, summing)
        self._launch["combine"](tokens + 1, THREADS, stream, summing)
        return out

    def _arguments(
        self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor, computed: Tensor
    ) -> bytes:
        base, masked, failed, ended = (word.data_ptr() for word in self._words)
        of_layer = layer % len(self._where)
        numbers = [
            base, masked, self._called_off, failed, ended,
            layer, self._me, len(hidden), self._experts, self._limit_ns,
        ]  # fmt: skip
        tensors = [
            self._where[of_layer], self._held, self._real, ids, weights, self._row_of, hidden, self._packed,
            self._ends, self._loads[of_layer], self._starts, self._sizes, self._firsts, computed, out,
        ]  # fmt: skip
        words = [*numbers, *(tensor.data_ptr() for tensor in tensors), *self._windows]
        return struct.pack(f"<{len(words)}Q", *words)
