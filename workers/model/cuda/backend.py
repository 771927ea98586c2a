"""The backend of NVIDIA GPUs: attention and experts from our kernels, all else plain torch that is measured at load."""

from __future__ import annotations

import hashlib
import time
from functools import partial
from pathlib import Path

import structlog
import torch
import triton
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources

from membership.base.enums import Exactness
from membership.base.errors import DeviceLost, ModelError, OutOfDeviceMemory, RankFailed
from membership.store.records import GpuUse
from workers.model.backend import NO_POOL, Activation, Attention, AttentionSpec, HeldExperts, MoeBoundary, StepFunction
from workers.model.calibrations import Calibrations
from workers.model.cpu.compute_threads import ComputeThreads
from workers.model.cpu.fingerprint import kernel_fingerprint
from workers.model.cpu.linear import make_invariant
from workers.model.cuda import kernels
from workers.model.cuda.attention import CudaAttention, tokens_at_once
from workers.model.cuda.attention_check import agree
from workers.model.cuda.dense import at_once
from workers.model.cuda.expert_products import CudaExpertProducts, ExpertKernels
from workers.model.cuda.graphs import StepGraphs
from workers.model.cuda.kv_cache import CudaKVCache
from workers.model.cuda.kv_memory import FULL, lasting_memory, own_memory
from workers.model.cuda.local_experts import CudaLocalExperts
from workers.model.cuda.norm import fuse_norms
from workers.model.cuda.rotary import fuse_rotary
from workers.model.cuda.router import fuse_routers
from workers.model.row_tiles import RowTiles

log = structlog.get_logger(__name__)

NO_MEMORY = "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
"""In what is raised for want of a device's memory where no allocator of torch was asked: a context, a kernel's code, a
library's own memory."""


def _lacks_memory(error: BaseException) -> bool:
    said = str(error)
    if isinstance(error, RankFailed):  # of our own allocator; others' words may be of another device
        return FULL in said
    return isinstance(error, RuntimeError) and any(each in said for each in NO_MEMORY)


class CudaBackend:
    """Satisfies `Backend`. With a CPU it needs Triton's interpreter, as the tests have it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool_fd = NO_POOL
        self._kernels: ExpertKernels | None = None  # of this model's experts, whichever way they are called
        self._recorded: list[int] = []  # rows of each step that was
        self._recorded_at = 0.0
        try:
            self.enter_thread()
        except RuntimeError as error:
            if _lacks_memory(error):
                raise OutOfDeviceMemory(f"{device}: {error}") from error
            raise

    def enter_thread(self) -> None:
        """Triton launches on the GPU of the thread, whatever it is given; using another makes a context there."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def pack(self, matrix: Tensor) -> bytes:
        """It stays plain."""
        return b""

    def finish(self) -> None:
        """For the stream of this thread."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def check(self, error: BaseException) -> bool:
        """Some errors (a launch failure, an illegal address, what comes with an Xid) are then every later call's, too;
        a question that waits for nothing tells. Where memory has ended, what torch keeps in reserve is given back.
        """
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.current_stream(self.device).query()
            short = _lacks_memory(error)
            if short:
                torch.cuda.empty_cache()
            return short
        except RuntimeError as failed:
            if _lacks_memory(failed):  # there is no room for a context, either
                return True
            raise DeviceLost(f"{self.device}: {str(failed).splitlines()[0]}") from error

    def seen(self) -> GpuUse | None:
        """See `Backend`."""
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        index = self.device.index or 0
        return GpuUse(
            index=index,
            uuid=f"GPU-{torch.cuda.get_device_properties(index).uuid}",  # as nvidia-smi has it
            free=free,
            total=total,
            graphs=len(self._recorded),
            graph_rows=tuple(sorted(set(self._recorded))),
            recorded_at=self._recorded_at,
        )

    def _note_recorded(self, rows: int) -> None:
        self._recorded.append(rows)
        self._recorded_at = time.time()

    def use_cores(self, count: int) -> None:
        """Nothing: cores do not compute."""

    def fills(self, cores: int, weights: int) -> bool:
        """No: each rank has a device of its own."""
        return False

    def close(self) -> None:
        """Nothing: it has no threads."""

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """As stored."""
        return stored

    def fingerprint(self, dtype: torch.dtype) -> str:
        """Of torch's kernels on this device, and of ours: their text and what compiles it."""
        ours = Path(kernels.__file__).read_bytes()
        plain = kernel_fingerprint(dtype, self.device)
        return hashlib.sha256(f"{plain} {triton.__version__}".encode() + ours).hexdigest()[:16]

    def fuse(self, model: nn.Module) -> None:
        """Norms, routers, rotary embeddings."""
        fuse_norms(model)
        fuse_routers(model)
        fuse_rotary([module for module in model.modules() if hasattr(module, "layer_idx")], self.device)

    def make_invariant(self, model: nn.Module, calibrations: Calibrations) -> RowTiles:
        """See `Backend`."""
        return make_invariant(model, calibrations, ComputeThreads(), at_once)

    def attention(self, spec: AttentionSpec, exactness: Exactness, calibrations: Calibrations) -> CudaAttention:
        """See `Backend`. One way for both: its tiles are fixed, or have the same bits."""
        take = own_memory if self.pool_fd == NO_POOL or self.device.type != "cuda" else lasting_memory
        cache = CudaKVCache(spec.layers, spec.blocks, spec.block_size, spec.dtype, take)
        tokens = tokens_at_once(spec.group, max(spec.key_width, spec.value_width) * spec.dtype.itemsize)
        if tokens > 1:
            shape = (
                f"{spec.group} x {spec.key_width} to {spec.value_width} of {spec.dtype}, blocks of {spec.block_size}"
            )
            (tokens,) = calibrations.of(f"tokens at once, {shape}", partial(self._exact_tokens, spec, tokens))
        return CudaAttention(cache, self.device, tokens)

    def _exact_tokens(self, spec: AttentionSpec, tokens: int) -> tuple[int]:
        try:
            if agree(spec, tokens, self.device):
                return (tokens,)
            log.warning("tokens_at_once_round_otherwise", tokens=tokens)
        except OutOfResources as error:  # a GPU with less shared memory
            log.warning("tokens_at_once_do_not_fit", tokens=tokens, error=str(error))
        return (1,)

    def expert_products(
        self, activation: Activation, exactness: Exactness, calibrations: Calibrations
    ) -> CudaExpertProducts:
        """See `Backend`."""
        products = CudaExpertProducts(activation, exactness, calibrations)
        self._kernels = products.kernels
        return products

    def local_experts(self, held: HeldExperts, activation: Activation, shape: tuple[int, int]) -> CudaLocalExperts:
        """See `Backend`. Wide tiles are used where `expert_products` may use them."""
        kernels = self._kernels or ExpertKernels(activation, wide=False)
        return CudaLocalExperts(held, kernels, shape, self.device)

    def capture(self, step: StepFunction, attention: Attention, experts: MoeBoundary) -> StepFunction:
        """Decode steps as CUDA graphs. ModelError for another backend's attention."""
        if self.device.type != "cuda":
            return step
        if not isinstance(attention, CudaAttention):
            raise ModelError("this attention is not of the CUDA backend")
        return StepGraphs(step, attention, experts, self._note_recorded)
