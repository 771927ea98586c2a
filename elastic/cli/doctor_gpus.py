"""What `elastic doctor` says of this machine's GPUs, by the driver's own tool: no context is made, nothing is imported.

Findings are made of what the tool printed, so they are tested without a GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from elastic.cli.render import in_bytes
from elastic.serve.model_check import Finding
from elastic.serve.options import DEFAULTS
from membership.store.records import Placement
from workers.model.families import ModelInfo

TOOL = "nvidia-smi"
TIMEOUT_S = 20.0
MIB = 1 << 20
CONTEXT_BYTES = 1 << 30  # of a rank: context, libraries' workspaces, kernels
QUERY = "--query-gpu=index,name,driver_version,memory.total,memory.used"
CELL = re.compile(r"\x1b\[[0-9;]*m")  # the tool underlines its heads


@dataclass(frozen=True)
class Gpu:
    """One of this machine's."""

    index: int
    name: str
    driver: str
    total: int  # bytes
    used: int


@dataclass(frozen=True)
class Gpus:
    """All of them, and which pairs reach one another: by P2P, and over what ("NV18", "PIX", ...)."""

    each: tuple[Gpu, ...] = ()
    peers: frozenset[tuple[int, int]] = frozenset()
    links: Mapping[tuple[int, int], str] | None = None


def read_gpus(listed: str, p2p: str, topology: str) -> Gpus:
    """Of what the tool printed."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.strip()]
    each = tuple(Gpu(int(i), name, driver, int(t) * MIB, int(u) * MIB) for i, name, driver, t, u in rows)
    peers = frozenset(pair for pair, said in _matrix(p2p, len(each)).items() if said == "OK")
    return Gpus(each, peers, _matrix(topology, len(each)))


def _matrix(printed: str, count: int) -> dict[tuple[int, int], str]:
    """What is said of each pair, from rows such as "GPU0  X  NV18  0-31"."""
    found: dict[tuple[int, int], str] = {}
    for line in CELL.sub("", printed).splitlines():
        head, *cells = line.split() or [""]
        if (row := re.fullmatch(r"GPU(\d+)", head)) and len(cells) >= count and not cells[0].startswith("GPU"):
            found |= {(int(row[1]), column): cell for column, cell in enumerate(cells[:count])}
    return found


def probe() -> Gpus | Finding | None:
    """This machine's; None without NVIDIA's driver; a finding if its tool fails."""
    if shutil.which(TOOL) is None:
        return None
    try:
        printed = [_said(QUERY, "--format=csv,noheader,nounits"), _said("topo", "-p2p", "r"), _said("topo", "-m")]
        return read_gpus(*printed)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Finding(
            "gpu", "warn", f"{TOOL}: {error}", "is the driver loaded, and are devices given to this container?"
        )


def _said(*arguments: str) -> str:
    command = [TOOL, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=TIMEOUT_S, check=True).stdout


def describe(gpus: Gpus) -> Iterator[Finding]:
    """A line per GPU, and what rows and KV blocks can travel between them."""
    for gpu in gpus.each:
        memory = f"{in_bytes(gpu.total - gpu.used)} of {in_bytes(gpu.total)} free"
        yield Finding(f"gpu {gpu.index}", "ok", f"{gpu.name}, driver {gpu.driver}, {memory}")
    if len(gpus.each) < 2:
        return
    pairs = list(combinations(range(len(gpus.each)), 2))
    apart = [(a, b) for a, b in pairs if not {(a, b), (b, a)} <= gpus.peers]
    links = ", ".join(sorted({(gpus.links or {}).get(pair, "unknown") for pair in pairs}))
    if apart:
        said = ", ".join(f"{a} and {b}" for a, b in apart)
        hint = "rows and KV blocks go through host memory there: leave --gpu-exchange out"
        yield Finding("gpu p2p", "warn", f"not between GPUs {said}; links: {links}", hint)
    else:
        yield Finding("gpu p2p", "ok", f"between all {len(gpus.each)} GPUs; links: {links}")


def kv_token_bytes(config: Mapping[str, Any], itemsize: int) -> int:
    """Of one token in all layers of a model with this config.json."""
    heads = int(config["num_attention_heads"])
    if "qk_nope_head_dim" in config:
        widths = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"])
    else:
        width = config.get("head_dim") or config["hidden_size"] // heads
        widths = 2 * (config.get("num_key_value_heads") or heads) * width
    return int(config["num_hidden_layers"]) * int(widths) * itemsize


def fits(gpus: Sequence[Gpu], info: ModelInfo, placement: Placement) -> Iterator[Finding]:
    """Whether each GPU has room for its ranks, which take GPUs in turn; with the default `--kv-blocks`."""
    folder, expert = Path(info.path), info.expert_bytes("auto")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = sum((folder / file).stat().st_size for file in info.files)
    dense = max(0, stored - expert * info.experts * info.moe_layers)
    itemsize = 4 if info.dtype == "float32" else 2
    cache = kv_token_bytes(config, itemsize) * DEFAULTS["kv_blocks"] * DEFAULTS["block_size"]
    needed = dict.fromkeys(range(len(gpus)), 0)
    for rank, layers in placement.items():
        slots = sum(len(layer) for layer in layers)
        needed[rank % len(gpus)] += dense + slots * expert + cache + CONTEXT_BYTES
    once = expert * info.experts * info.moe_layers
    copies = sum(len(layer) for layers in placement.values() for layer in layers) * expert - once
    for gpu in gpus:
        parts = f"its ranks need {in_bytes(needed[gpu.index])} of {in_bytes(gpu.total)}"
        said = (
            f"{parts}; a rank: {in_bytes(dense)} dense, {in_bytes(cache)} KV cache; replicas: {in_bytes(copies)} in all"
        )
        hint = ""
        if needed[gpu.index] > gpu.total:
            hint = "more GPUs, a lower --redundancy, or fewer --kv-blocks"
        elif needed[gpu.index] + cache > gpu.total:
            hint = "no room for a dead rank's KV cache beside its successor's, which would wait: fewer --kv-blocks"
        yield Finding(f"gpu {gpu.index} fit", "warn" if hint else "ok", said, hint)
