"""This rank's part in steps that all ranks of a host run together, with rows that travel between their GPUs.

Opened once, while the first view is prepared: all slots' windows are mapped then, so that what is recorded in graphs
outlives every change of the view. What cannot be had is a reason, not an error: rows go over host memory as before, and
the engine learns why from the answer to the first such step (`StepStatus.APART`).
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import structlog

from membership.base.errors import ElasticError
from membership.base.timing import TOGETHER_S
from membership.store.records import View
from workers.protocol.messages import StepBatch
from workers.protocol.window_client import WindowAsked, window_of
from workers.rank.worker_api import WorkerContext

if TYPE_CHECKING:
    from workers.exchange.cuda.driver import Mapping as Mapped
    from workers.exchange.cuda.window import WindowShape
    from workers.model.cuda.expert_products import CudaExpertProducts
    from workers.model.cuda.shared_experts import SharedExperts
    from workers.model.runner import ModelRunner

log = structlog.get_logger(__name__)


class Apart(ElasticError):
    """This rank cannot run a step together with the others."""


def holders_of(
    placement: Mapping[int, Sequence[Sequence[int]]], live: Collection[int], me: int, shape: tuple[int, int]
) -> list[list[int | None]]:
    """Whom to ask for each [layer][expert]: this rank itself if it can, else its holders by turns. `shape`: how many.

    Ranks may choose differently, as each asks for its own rows alone.
    """
    found: list[list[int | None]] = []
    for layer in range(shape[0]):
        holding: dict[int, list[int]] = {}
        for rank in sorted(live):
            for expert in placement.get(rank, ((),) * shape[0])[layer]:
                holding.setdefault(expert, []).append(rank)
        row: list[int | None] = []
        for expert in range(shape[1]):
            ranks = holding.get(expert, [])
            row.append(me if me in ranks else ranks[(expert + me) % len(ranks)] if ranks else None)
        found.append(row)
    return found


class GpuExchange:
    """Of one rank process."""

    def __init__(self, ctx: WorkerContext) -> None:
        self._ctx = ctx
        self._shared: SharedExperts | None = None
        self._refusal = "this rank has not prepared a view yet"
        self._placed: tuple[int, frozenset[int]] = (0, frozenset())  # epoch and live ranks that the tables are of
        self._mapped: list[Mapped] = []  # for as long as this process lives: kernels know their addresses
        self._called_off = 0  # where kernels find that word; likewise, and CUDA takes its page once only

    def refusal(self, view: View) -> str:
        """Why this rank's rows go over host memory in this view; empty if they may travel between GPUs."""
        if self._shared is None:
            return self._refusal
        slots, nodes = self._ctx.config.gpu_exchange, {member.node for member in view.members}
        if (last := max(view.ranks, default=0)) >= slots:
            return f"rank {last} serves, too, and --gpu-exchange {slots} is for ranks 0 to {slots - 1}"
        return f"ranks are on {len(nodes)} hosts" if len(nodes) > 1 else ""

    def open(self, runner: ModelRunner) -> None:
        """Map the windows of all slots, and make what uses them; in the thread that prepares. Never an error."""
        if self._shared is not None:
            return
        try:
            self._shared = runner.moe.shared = self._made(runner)
        except (ElasticError, ImportError, OSError, RuntimeError) as error:  # the last: CUDA, and what looks for NVRTC
            self._refusal = f"rank {self._ctx.rank}: {error}"
            log.warning("no_gpu_exchange", rank=self._ctx.rank, reason=str(error))

    def _made(self, runner: ModelRunner) -> SharedExperts:
        import torch

        config, info = self._ctx.config, runner.loaded.info
        device = runner.loaded.backend.device
        if device.type != "cuda" or runner.dtype != torch.bfloat16:
            raise Apart(f"rows travel between GPUs in bfloat16, not {runner.dtype} on {device.type}")
        from workers.exchange.cuda.calls import DeviceCalls, Reach
        from workers.exchange.cuda.driver import host_words
        from workers.exchange.cuda.window import WindowShape
        from workers.model.cuda.shared_experts import SharedExperts

        hidden = int(runner.loaded.model.config.hidden_size)
        shape = WindowShape(config.gpu_exchange, config.experts, config.max_batched_tokens, hidden, info.top_k)
        if self._ctx.rank >= shape.ranks:
            raise Apart(f"--gpu-exchange {shape.ranks} is for ranks 0 to {shape.ranks - 1}")
        gpu = torch.cuda.current_device()
        while len(self._mapped) < shape.ranks:  # a second try goes on where the first one failed
            self._mapped.append(self._window(len(self._mapped), shape, gpu))
        if not self._called_off:
            page = self._ctx.called_off_at & ~(mmap.PAGESIZE - 1)
            self._called_off = host_words(page, mmap.PAGESIZE) + self._ctx.called_off_at - page
        reach = Reach([each.address for each in self._mapped], self._called_off)
        calls = DeviceCalls(shape, self._ctx.rank, config.experts, reach, TOGETHER_S, config.moe_layers)
        kernels = cast("CudaExpertProducts", runner.products).kernels
        return SharedExperts(calls, shape, runner.bank, kernels, info.moe_layers)

    def _window(self, slot: int, shape: WindowShape, gpu: int) -> Mapped:
        import torch

        from workers.exchange.cuda.compiler import layout
        from workers.exchange.cuda.driver import Mapping as Mapped

        asked = WindowAsked(slot, layout(shape), own=slot == self._ctx.rank)
        make = partial(new_window, slot % torch.cuda.device_count(), shape.offsets["bytes"], gpu)
        with window_of(self._ctx.windows, asked, make) as (fd, nbytes):
            return Mapped(fd, nbytes, gpu)

    def begin(self, view: View, batch: StepBatch) -> SharedExperts:
        """Before such a step: where its experts are, its numbers, and who takes part. Apart."""
        if self._shared is None:
            raise Apart(self._refusal)
        live, slots = frozenset(batch.ranks), self._ctx.config.gpu_exchange
        if self._placed != (view.epoch, live):
            config = self._ctx.config
            shape = config.moe_layers, config.experts
            self._placed = (0, frozenset())
            self._shared.place(holders_of(view.placement, live, self._ctx.rank, shape))
            self._placed = view.epoch, live
        masked = sum(1 << slot for slot in range(slots) if slot not in live)
        rows = sum(len(chunk.tokens) for chunks in batch.ranks.values() for chunk in chunks)
        self._shared.follow(batch.together, masked, rows)
        return self._shared


def new_window(gpu: int, nbytes: int, mapping_gpu: int) -> tuple[int, int]:
    """A descriptor of zeroed memory on a GPU, and its size. RankFailed if it cannot be reached from the other GPU."""
    from workers.exchange.cuda.driver import Mapping as Mapped
    from workers.exchange.cuda.driver import make_memory

    fd, size = make_memory(gpu, nbytes)
    mapped = Mapped(fd, size, mapping_gpu)
    mapped.clear()
    mapped.close()
    return fd, size
