"""What `elastic doctor` says of this machine's GPUs: what they are, what is between them, whether ranks fit.

Findings are made of what was read (`elastic/serve/gpus.py`), so they are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations

from elastic.cli.render import in_bytes
from elastic.serve.gpu_memory import CONTEXT_BYTES, GPU_TOKENS, ModelMemory, Plan
from elastic.serve.gpus import Gpu, Gpus, exchange_slots, unlinked, usable
from elastic.serve.model_check import Finding
from elastic.serve.options import DEFAULTS
from membership.store.records import Placement
from workers.model.families import ModelInfo

FOR_GPUS = ("triton", "cuda-bindings", "nvidia-cuda-nvrtc")
FAST = "NV"  # NVLink, as the tool calls it


def describe(gpus: Gpus) -> Iterator[Finding]:
    """A line per GPU, and what rows and KV blocks can travel between them."""
    for gpu in gpus.each:
        memory = f"{in_bytes(gpu.total - gpu.used)} of {in_bytes(gpu.total)} free"
        yield Finding(f"gpu {gpu.index}", "ok", f"{gpu.name}, driver {gpu.driver}, {memory}")
    if len(gpus.each) < 2:
        return
    if gpus.unknown:
        hint = "rows and KV blocks go through host memory by default"
        yield Finding("gpu p2p", "warn", f"what is between GPUs is unknown: {gpus.unknown}", hint)
        return
    pairs = list(combinations(range(len(gpus.each)), 2))
    apart = unlinked(gpus)
    over = {pair: (gpus.links or {}).get(pair, "unknown") for pair in pairs}
    links = ", ".join(sorted(set(over.values())))
    if apart:
        said = ", ".join(f"{a} and {b}" for a, b in apart)
        hint = "rows and KV blocks go through host memory there, also with --gpu-exchange"
        yield Finding("gpu p2p", "warn", f"not between GPUs {said}; links: {links}", hint)
        return
    slow = sorted({link for link in over.values() if not link.startswith(FAST)})
    nvlink = f"NVLink, but {', '.join(slow)} between some" if len(slow) < len(set(over.values())) else "no NVLink"
    yield Finding(
        "gpu p2p", "ok", f"between all {len(gpus.each)} GPUs; links: {links}" + (f" ({nvlink})" if slow else "")
    )


def software(gpus: Gpus, version_of: Callable[[str], str] = version) -> Iterator[Finding]:
    """Whether what is installed can use the GPUs."""
    if not gpus.each:
        return
    try:
        torch = version_of("torch")
    except PackageNotFoundError:
        return  # said already
    if "+cpu" in torch:
        yield Finding(
            "gpu torch", "warn", f"torch {torch} computes on CPUs alone: the GPUs are not used",
            "install a CUDA build of torch, as https://pytorch.org says",
        )  # fmt: skip
    missing = []
    for package in FOR_GPUS:
        try:
            version_of(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        yield Finding(
            "gpu packages", "warn", f"{', '.join(missing)} not installed: {_without(missing)}",
            "pip install 'elastic-ep[cuda]'",
        )  # fmt: skip


def exchange(gpus: Gpus, ranks: int) -> Iterator[Finding]:
    """How so many ranks' rows travel if `--gpu-exchange` is not given."""
    slots, reason = exchange_slots(gpus, ranks)
    if gpus.each:
        reason = reason or usable()
        said = f"over host memory: {reason}" if reason else f"between GPUs, of ranks 0 to {slots - 1}"
        yield Finding("gpu exchange", "ok", f"ranks' rows travel {said}")


def _without(missing: Sequence[str]) -> str:
    if FOR_GPUS[0] in missing:
        return "ranks cannot compute on GPUs"
    return "KV blocks and experts end with their rank, and rows do not travel between GPUs"


def fits(gpus: Gpus, info: ModelInfo, placement: Placement, redundancy: float) -> Iterator[Finding]:
    """Whether each GPU has room for its ranks, which take GPUs in turn, also while one of them is dead; with the
    default `--kv-blocks` and `--gpu-exchange`."""
    memory, count = ModelMemory.of(info), len(gpus.each)
    cache = memory.kv_token * DEFAULTS["kv_blocks"] * DEFAULTS["block_size"]
    slots, _ = (0, "") if usable() else exchange_slots(gpus, len(placement))
    plan = Plan(len(placement), redundancy, gpu_exchange=slots, rows=GPU_TOKENS)
    window, most = plan.window(info), plan.held(info.experts) * info.moe_layers * memory.expert
    held = {rank: sum(map(len, layers)) * memory.expert for rank, layers in placement.items()}
    copies = sum(held.values()) - memory.once
    for gpu in gpus.each:
        ranks = [rank for rank in placement if rank % count == gpu.index]
        needed = sum(memory.dense + max(most, held[rank]) + window + cache + CONTEXT_BYTES for rank in ranks)
        parts = ", ".join(
            f"rank {rank}: {in_bytes(memory.dense)} dense, {in_bytes(held[rank])} experts"
            + (f" and {in_bytes(most - held[rank])} more while another rank is dead" if most > held[rank] else "")
            + (f", {in_bytes(window)} rows of others" if window else "")
            + f", {in_bytes(cache)} KV cache"
            for rank in ranks
        )
        replicas = in_bytes(copies * sum(held[rank] for rank in ranks) / max(1, sum(held.values())))
        said = f"its ranks need {in_bytes(needed)} of {in_bytes(gpu.total)} ({parts}); replicas take {replicas} of that"
        yield Finding(f"gpu {gpu.index} fit", *_verdict(gpu, needed, cache, said))


def _verdict(gpu: Gpu, needed: int, cache: int, said: str) -> tuple[str, str, str]:
    """Level, message, hint."""
    free = gpu.total - gpu.used
    if needed > gpu.total:
        return "warn", said, "more GPUs, a lower --redundancy, or fewer --kv-blocks"
    if needed + cache > gpu.total:
        hint = "no room for a dead rank's KV cache beside its successor's, which would wait: fewer --kv-blocks"
        return "warn", said, hint
    if needed > free:
        hint = "unless these are ranks of ours: end what uses the GPU, see nvidia-smi"
        return "warn", f"{said}, and {in_bytes(free)} are free", hint
    return "ok", said, ""
