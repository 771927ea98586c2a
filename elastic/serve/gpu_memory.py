"""What ranks need of their GPUs' memory, and how large KV caches may be beside that. Pure: the GPUs are passed in.

Ranks take the GPUs of a host in turn, and so do spares. A rank has the dense weights, its experts, its window for rows
of others (`--gpu-exchange`), a KV cache, and what CUDA and its libraries take; a spare has no experts and no window.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.serve.gpus import Gpu
from membership.base.errors import ConfigError
from workers.exchange.cuda.window import WindowShape
from workers.model.families import ModelInfo

CONTEXT_BYTES = 2 << 30  # of a rank: context, kernels, workspaces, activations; 1.2 to 2.2 GB were seen on H200s
POOLS = 3  # of what experts compute: of steps that are not recorded, of those that are, of those without own rows
GPU_TOKENS = 2048  # of a rank and step: fewer are bound by reading the weights, and by how fast the host launches
FLAG = "--kv-cache-memory"


@dataclass(frozen=True)
class ModelMemory:
    """Of one checkpoint, in bytes."""

    dense: int  # all but routed experts
    expert: int  # one, in one layer
    once: int  # all routed experts of all layers, one replica each
    kv_token: int  # of the KV cache, in all layers
    experts: int  # per layer
    layers: int  # with experts

    @classmethod
    def of(cls, info: ModelInfo, dtype: str = "auto") -> ModelMemory:
        """By its files and its config.json."""
        folder = Path(info.path)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = sum((folder / file).stat().st_size for file in info.files)
        as_stored = info.expert_bytes("auto") * info.experts * info.moe_layers
        expert = info.expert_bytes(dtype)
        kind = info.dtype if dtype == "auto" else dtype
        dense = max(0, stored - as_stored) * expert // max(1, info.expert_bytes("auto"))
        kv_token = kv_token_bytes(config, 4 if kind == "float32" else 2)
        once = expert * info.experts * info.moe_layers
        return cls(dense, expert, once, kv_token, info.experts, info.moe_layers)


def kv_token_bytes(config: Mapping[str, Any], itemsize: int) -> int:
    """Of one token in all layers of a model with this config.json."""
    heads = int(config["num_attention_heads"])
    if "qk_nope_head_dim" in config:
        widths = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"])
    else:
        width = config.get("head_dim") or config["hidden_size"] // heads
        widths = 2 * (config.get("num_key_value_heads") or heads) * width
    return int(config["num_hidden_layers"]) * int(widths) * itemsize


@dataclass(frozen=True)
class Plan:
    """What is to run on one host. `gpu_exchange`: ranks whose rows, `rows` per step, travel between GPUs (0: none)."""

    ranks: int
    redundancy: float
    spares: int = 0
    gpu_exchange: int = 0
    rows: int = 0

    def window(self, info: ModelInfo) -> int:
        """Bytes of a rank's window, and of what the rank packs and computes for as many rows as it has room for."""
        if not self.gpu_exchange:
            return 0
        shape = WindowShape(self.gpu_exchange, info.experts, self.rows, info.hidden, info.top_k)
        computed = shape.room * (info.hidden + info.expert_width) * shape.element_bytes
        return shape.offsets["bytes"] + shape.room * shape.row_bytes + POOLS * computed

    def held(self, experts: int) -> int:
        """Experts of a layer that a rank holds at most while one of the others is dead."""
        return min(experts, math.ceil(experts * max(1.0, self.redundancy) / max(1, self.ranks - 1)))


def kv_blocks(
    fraction: float,
    gpus: Sequence[Gpu],
    info: ModelInfo,
    plan: Plan,
    block_size: int,
    longest: int,
    dtype: str = "auto",
) -> int:
    """How many blocks each cache may have, if all on a GPU together take this part of its memory.

    Of the smallest GPU, with the experts that a rank holds while another one is dead. ConfigError if not even `longest`
    tokens, those of one request, have room; it says what takes how much.
    """
    if not gpus:
        raise ConfigError(
            f"{FLAG} {fraction:g}: there is no GPU here", hint="use --kv-blocks, or run it on a GPU's host"
        )
    gpu = min(gpus, key=lambda each: each.total)
    memory, window = ModelMemory.of(info, dtype), plan.window(info)
    ranks, spares = (-(-count // len(gpus)) for count in (plan.ranks, plan.spares))
    experts = plan.held(info.experts) * info.moe_layers * memory.expert
    fixed = ranks * (memory.dense + experts + window + CONTEXT_BYTES) + spares * (memory.dense + CONTEXT_BYTES)
    left = int(fraction * gpu.total) - fixed
    found = left // (ranks + spares) // (memory.kv_token * block_size) - 1  # one for what must be written somewhere
    if found * block_size >= longest:
        return found
    parts = (
        f"{ranks} ranks need {_gb(ranks * experts)} for experts, {_gb(ranks * memory.dense)} for all other weights, "
        f"{_gb(ranks * window)} for rows of others and {_gb(ranks * CONTEXT_BYTES)} beside that"
    ) + (f", {spares} spares {_gb(spares * (memory.dense + CONTEXT_BYTES))}" if spares else "")
    one = f"{_gb(memory.kv_token * longest)} for one request of {longest} tokens in each of {ranks + spares} KV caches"
    raise ConfigError(
        f"{FLAG} {fraction:g} of a GPU's {_gb(gpu.total)} is {_gb(fraction * gpu.total)}; there {parts}, and {one}",
        hint="more GPUs, a lower --redundancy or --max-model-len, fewer --spares or ranks, or a larger part",
    )


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"
