"""The backend of plain torch operations: every piece is in a module of its own, this joins them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from membership.base.enums import Exactness
from workers.model.backend import NO_POOL, Activation, Attention, AttentionSpec, HeldExperts, MoeBoundary, StepFunction
from workers.model.calibrations import Calibrations
from workers.model.cpu.attention import CpuAttention
from workers.model.cpu.attention_check import fewest_exact_rows
from workers.model.cpu.compute_threads import LEAST, MOST, ComputeThreads, product_work
from workers.model.cpu.expert_products import CpuExpertProducts
from workers.model.cpu.fingerprint import kernel_fingerprint
from workers.model.cpu.kv_cache import CpuKVCache
from workers.model.cpu.linear import make_invariant
from workers.model.packing import pack, use_packed
from workers.model.row_tiles import RowTiles


class CpuBackend:
    """Satisfies `Backend` for CPUs. With a CUDA device it runs the same operations there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool_fd = NO_POOL
        self._threads = ComputeThreads()

    def pack(self, matrix: Tensor) -> bytes:
        """See `Backend`."""
        return pack(matrix) if self.device.type == "cpu" else b""

    def finish(self) -> None:
        """Nothing: it is done when it returns."""

    def check(self, error: BaseException) -> bool:
        """No: a CPU computes on."""
        return False

    def seen(self) -> None:
        """None: it computes on no GPU."""

    def use_cores(self, count: int) -> None:
        """See `Backend`."""
        self._threads.count = max(1, min(count, MOST)) if self.device.type == "cpu" else 1

    def fills(self, cores: int, weights: int) -> bool:
        """See `Backend`."""
        return self.device.type == "cpu" and cores <= MOST and product_work(1, weights) >= LEAST

    def close(self) -> None:
        """See `Backend`."""
        self._threads.close()

    def enter_thread(self) -> None:
        """All threads use the same CPU."""

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """As stored, save for float16 on CPUs, which lack kernels for it."""
        return torch.float32 if stored == torch.float16 and self.device.type == "cpu" else stored

    def fingerprint(self, dtype: torch.dtype) -> str:
        """See `Backend`."""
        return kernel_fingerprint(dtype, self.device)

    def fuse(self, model: nn.Module) -> None:
        """Only what products take: oneDNN has no such operations."""
        use_packed(model)

    def make_invariant(self, model: nn.Module, calibrations: Calibrations) -> RowTiles:
        """See `Backend`."""
        return make_invariant(model, calibrations, self._threads)

    def attention(self, spec: AttentionSpec, exactness: Exactness, calibrations: Calibrations) -> CpuAttention:
        """See `Backend`. What exact attention needs is measured on the device that computes."""
        kept_as = torch.float32 if self.device.type == "cpu" else spec.dtype
        cache = CpuKVCache(spec.layers, spec.blocks, spec.block_size, kept_as, self.pool_fd)
        made = CpuAttention(cache, self._threads)
        if exactness == Exactness.INVARIANT:
            shape = f"{spec.group} x {spec.key_width} to {spec.value_width} over {spec.longest}"
            what = f"attention {shape} on {self.device.type}"
            (made.min_rows,) = calibrations.of(what, lambda: (fewest_exact_rows(spec, self.device),))
        return made

    def expert_products(
        self, activation: Activation, exactness: Exactness, calibrations: Calibrations
    ) -> CpuExpertProducts:
        """See `Backend`."""
        return CpuExpertProducts(activation, exactness, calibrations, self._threads)

    def local_experts(self, held: HeldExperts, activation: Activation, shape: tuple[int, int]) -> None:
        """None: rows are in host memory already, where the exchange has them at hand."""

    def capture(self, step: StepFunction, attention: Attention, experts: MoeBoundary) -> StepFunction:
        """The step itself: nothing is recorded."""
        return step
