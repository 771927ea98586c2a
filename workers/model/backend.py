"""What a device must give so that a model runs on it. The runner, the loader and the worker know nothing else of it.

A new device is a folder beside `cpu/` with a class that satisfies `Backend`, and a line in `devices.py`. The tests of
this protocol (`tests/unit/workers/model/test_backend.py`) run for every line there.

Letters in shapes: T rows of a step, H hidden width, I inner width of an expert, Hq query heads, Hkv key/value heads,
D width of a key, Dv width of a value. "Exact" means to the last bit, and is owed under Exactness.INVARIANT only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from membership.base.enums import Exactness
from membership.store.records import GpuUse
from workers.model.attention_plan import StepPlan
from workers.model.calibrations import Calibrations
from workers.model.expert_source import ExpertWeights
from workers.model.row_tiles import RowTiles

Activation = Callable[[Tensor], Tensor]
"""[R, 2I] -> [R, I]: what an expert does between its two products."""
NO_POOL = -1
StepFunction = Callable[[StepPlan], Tensor]
"""The model without its head: a step's plan -> hidden states [plan.padded, H]."""


@dataclass(frozen=True)
class AttentionSpec:
    """All attention layers of a model, and the KV cache that they use."""

    layers: int
    group: int  # query heads per key/value head
    key_width: int  # D
    value_width: int  # Dv
    longest: int  # tokens of the longest sequence
    blocks: int  # KV blocks of this rank
    block_size: int  # tokens per KV block
    dtype: torch.dtype  # of activations; the backend decides in which type it keeps keys and values


class Lasting(NamedTuple):
    """Memory on a device that outlives its process as long as a process has its descriptor."""

    fd: int = -1  # the holder's to close
    nbytes: int = 0  # 0: there is none


class Reached(Protocol):
    """Such memory of another process, where our device reaches it."""

    @property
    def address(self) -> int:
        """Where."""

    @property
    def size(self) -> int:
        """Bytes."""


class KVCache(Protocol):
    """Keys and values of all layers, in blocks. What is in a block is the backend's affair; all its ranks agree on it.

    A token's place is (block, offset in the block). Writing a place again replaces what was there.
    """

    blocks: int
    block_size: int  # tokens per block

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers; 0 before the first step."""

    def put(self, block: int, bits: memoryview[int]) -> bool:
        """Replace a block in all layers by the bits of one in the memory of another rank of this host, where each is at
        the same place (`Backend.pool_fd`). False if it is on a device."""

    def hand_over(self) -> Lasting:
        """Its memory, to be kept for others by who asks first; nothing if it is not on a device, or ends with us."""

    def fetch(self, blocks: Sequence[int], pool: Reached, there: Sequence[int]) -> bool:
        """Copy blocks `there` of the cache of another rank of this host into `blocks`; done once `Backend.finish`
        returns. False if this cache is not on a device, or laid out in another way."""

    def copy_out(self, blocks: Sequence[int], room: memoryview[int]) -> None:
        """Copy the bits of `blocks` to the first `len(blocks) * block_bytes` bytes of host memory."""

    def copy_in(self, blocks: Sequence[int], room: memoryview[int]) -> None:
        """The reverse: the same tokens are then in `blocks`, which may be others than those they came from."""


class Attention(Protocol):
    """Attention over the KV cache: each token looks at its own sequence, up to itself."""

    tiled: bool  # whether it uses the tiles of a plan
    plan: StepPlan | None  # of the step that runs now; the runner sets and clears it

    @property
    def cache(self) -> KVCache:
        """Where `forward` writes."""

    def forward(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Write the step's keys and values to the places that the plan gives, and attend.

        query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv], T being `plan.padded`; what
        comes out for rows past `plan.rows` is finite and means nothing. With a `window` a token sees that many tokens,
        itself included. Exact: a token's result depends on its sequence alone, neither on the other sequences of the
        step nor on how its own was cut into steps. ModelError outside of a step.
        """


class MoeBoundary(Protocol):
    """The MoE layers of a model: where a step leaves its device."""

    on_device: LocalExperts | None
    """Computes the experts of the step that runs now without its leaving the device; `leave` is not called then. A
    recording is of one of them. None: rows travel through the host."""

    leave: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None
    """What a recorder wants called in the place of an MoE layer: layer, hidden [T, H], ids and weights [T, k] -> [T, H]
    with T being the rows of the step with its padding. None: nothing is being recorded."""

    def compute(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The routed part of an MoE layer for real rows alone, on whichever ranks: as the exchange, with its errors."""


class HeldExperts(Protocol):
    """The experts that a rank holds, by (MoE layer, logical id)."""

    version: int  # another one whenever an expert has come or gone

    def holds(self, layer: int, expert: int) -> bool:
        """Whether this one is here."""

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """ModelError if it is not here."""


class LocalExperts(Protocol):
    """The routed experts of a step that does not leave the device: all are here, or it reaches the other ranks'."""

    @property
    def many(self) -> bool:
        """Whether those of this step are computed as for many rows of other ranks: a recording is of one kind."""

    def begin(self, rows: int) -> bool:
        """Before each step, which has that many real rows: whether it can compute all experts."""

    def compute(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The routed part of an MoE layer: hidden [T, H], ids and weights [T, k] -> [T, H], zeros past the real rows.

        The same bits as through the exchange. May be captured.
        """

    def check(self) -> None:
        """Once a step's results are there: CalledOff if they mean nothing."""

    def take_load(self) -> npt.NDArray[np.uint32]:
        """Real rows routed to each [layer, expert] since the last call, by this rank or to it."""


class ExpertProducts(Protocol):
    """The two matrix products of experts, all of one shape. `calibrate` may run in any thread, beside `compute`."""

    def calibrate(self, weights: ExpertWeights) -> None:
        """Called with every expert before it is used. ModelError if exact products are impossible on this device."""

    def padded(self, rows: int) -> int:
        """How many rows `compute` wants for an expert that has `rows`, >= `rows`; the added ones may hold anything."""

    def compute(self, experts: Sequence[ExpertWeights], sizes: Sequence[int], rows: Tensor) -> Tensor:
        """[R, H] -> [R, H]: the first `sizes[0]` rows are for `experts[0]`, and so on; each size as `padded` gave it.

        Exact: a row's result depends on that row and its expert alone.
        """


class Backend(Protocol):
    """One device of one rank."""

    pool_fd: int  # an empty memfd for the KV cache, which a device replaces by memory of its own; its giver's

    @property
    def device(self) -> torch.device:
        """Where weights, caches and activations are."""

    def enter_thread(self) -> None:
        """Called first in each thread that is to use this backend: some devices are chosen per thread."""

    def pack(self, matrix: Tensor) -> bytes:
        """Lay a matrix [N, K] in host memory out, in place, as this device multiplies fastest: see `packing.py`."""

    def finish(self) -> None:
        """Until all that this thread has begun is done. What a step or a copy has written counts only then."""

    def check(self, error: BaseException) -> bool:
        """After work that failed with this error: DeviceLost if all that follows would fail, too. Does not wait.

        Whether it failed for want of memory; what is held in reserve was given back then.
        """

    def seen(self) -> GpuUse | None:
        """The GPU that it computes on, with the memory that is free there and the steps that were recorded; None if it
        is none. Takes some tens of microseconds. How rows travel is not known here."""

    def use_cores(self, count: int) -> None:
        """How many of the host's cores the next products may take, this thread's included; shows in no bit of them."""

    def fills(self, cores: int, weights: int) -> bool:
        """Whether one rank alone makes use of so many cores, where an expert has so many weights."""

    def close(self) -> None:
        """End what threads it has."""

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The type to compute in, for weights stored as `stored`, if nothing else is asked for."""

    def fingerprint(self, dtype: torch.dtype) -> str:
        """A short string; equal on ranks that compute the same bits, judged by samples."""

    def fuse(self, model: nn.Module) -> None:
        """Replace modules by what is faster on this device, with the same results but for rounding."""

    def make_invariant(self, model: nn.Module, calibrations: Calibrations) -> RowTiles:
        """Make every product and norm of `model` (all but attention and routed experts) exact.

        Returns the row counts of whole steps with which that holds. ModelError if it cannot be had on this device.
        """

    def attention(self, spec: AttentionSpec, exactness: Exactness, calibrations: Calibrations) -> Attention:
        """Attention and an empty KV cache. ModelError if exact attention is asked for and impossible on this device."""

    def expert_products(
        self, activation: Activation, exactness: Exactness, calibrations: Calibrations
    ) -> ExpertProducts:
        """The products of this model's routed experts."""

    def local_experts(self, held: HeldExperts, activation: Activation, shape: tuple[int, int]) -> LocalExperts | None:
        """For steps whose experts are all here; `shape`: MoE layers, experts. None: the exchange does as well."""

    def capture(self, step: StepFunction, attention: Attention, experts: MoeBoundary) -> StepFunction:
        """`step`, or something faster with the same results, such as graphs recorded once per padded size.

        `attention` (this backend's) and `experts` are those that `step` uses. No plan and no change of membership may
        make what was recorded invalid. A result may be overwritten by the next call.
        """
