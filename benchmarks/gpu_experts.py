"""The products of routed experts on a GPU, alone: microseconds of a call by rows and tiles, and that bits are the same.

    python -m benchmarks.gpu_experts [--rows 1,8,32,128,512,2048,4096] [--held 64]

A GPU that holds `--held` of 128 experts of Qwen3-30B-A3B's shape, top-8, for rows of all ranks together; calls are in
graphs, tiles by turns. `floor`: what reading the experts in use takes at the rate at which this GPU copies.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch

EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768
LAYERS = 6  # each with matrices of its own, so that none is in the GPU's cache when it is read
TURNS = 7


def tiles() -> dict[str, tuple[Any, int]]:
    """Names of (tile, from how many rows on it is used as the wide one; `MANY`: as the narrow one)."""
    from workers.model.cuda.expert_products import FEW, HIGH, MANY, NARROW, WIDE

    narrow = {
        "narrow": NARROW,
        "64 columns": replace(NARROW, columns=64, warps=4),
        "64 columns, 3 stages": replace(NARROW, columns=64, warps=4, stages=3),
        "4 warps": replace(NARROW, warps=4),
        "5 stages": replace(NARROW, stages=5),
        "256 deep": replace(NARROW, piece_bytes=512, stages=3),
    }
    wide = {
        "wide": WIDE,
        "wide, 4 stages": replace(WIDE, stages=4),
        "128 rows, 8 warps": HIGH,
        "128 rows, 8 warps, 4 stages": replace(HIGH, stages=4),
        "256 columns, 8 warps": replace(HIGH, columns=256),
        "128 rows, 4 warps": replace(HIGH, warps=4),
        "64 columns wide": replace(WIDE, columns=64),
    }
    return {name: (tile, MANY) for name, tile in narrow.items()} | {name: (tile, FEW) for name, tile in wide.items()}


class Layers:
    """Experts of a few layers on this GPU, and rows for them."""

    def __init__(self, held: int) -> None:
        from workers.model.cuda.expert_products import ExpertKernels, addresses_of

        def matrices(rows: int, columns: int) -> list[Any]:
            return [(torch.randn(rows, columns, device="cuda") / columns**0.5).bfloat16().t() for _ in range(held)]

        self._layers = [(matrices(2 * INNER, HIDDEN), matrices(HIDDEN, INNER)) for _ in range(LAYERS)]
        self._at = [[torch.tensor(addresses_of(each), device="cuda") for each in layer] for layer in self._layers]
        self._held = held

        def gate(both: Any) -> Any:
            return torch.nn.functional.silu(both[:, : both.shape[1] // 2]) * both[:, both.shape[1] // 2 :]

        self.kernels = ExpertKernels(gate, wide=True)
        self.kernels.look(self._layers[0][0][0])

    def routed(self, rows: int) -> tuple[Any, Any, int]:
        """The rows that fall to this GPU, packed by expert, where each begins, and how many experts are in use."""
        pick = torch.Generator().manual_seed(rows)
        ids = torch.rand(rows, EXPERTS, generator=pick).topk(TOP_K).indices.flatten()
        sizes = ids.bincount(minlength=EXPERTS)[: self._held]
        ends = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0))).int().cuda()
        packed = torch.randn(max(int(sizes.sum()), 1), HIDDEN, generator=pick).bfloat16().cuda()
        return packed, ends, int((sizes > 0).sum())

    def run(self, packed: Any, ends: Any, few: int) -> Any:
        out = packed
        for (up, down), (up_at, down_at) in zip(self._layers, self._at, strict=True):
            out = self.kernels.run(packed, (up[0], up_at), (down[0], down_at), ends, few=few)
        return out


def timed(run: Any) -> tuple[Any, float]:
    """What a call gives, and microseconds of a layer of it."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(TURNS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / LAYERS)
    return out.clone(), statistics.median(times)


def copy_rate() -> float:
    """Bytes per microsecond, read and written together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    begin.record()
    for _ in range(5):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 10 * source.nbytes / (1000 * begin.elapsed_time(end))


def main() -> None:
    """Print a JSON line per number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,32,64,128,512,2048,4096")
    parser.add_argument("--held", type=int, default=64)
    arguments = parser.parse_args()
    from workers.model.cuda import expert_products

    layers, rate = Layers(arguments.held), copy_rate()
    bytes_of_expert = 3 * HIDDEN * INNER * 2
    for rows in map(int, arguments.rows.split(",")):
        packed, ends, used = layers.routed(rows)
        found, outs = {}, {}
        for name, (tile, few) in tiles().items():
            wide = few != expert_products.MANY
            if wide != (rows >= 256) and name != "narrow":
                continue
            before = expert_products.NARROW, expert_products.WIDE, expert_products.HIGH
            if wide:
                expert_products.WIDE = expert_products.HIGH = tile
            else:
                expert_products.NARROW = tile
            try:
                outs[name], found[name] = timed(partial(layers.run, packed, ends, few))
            except Exception as error:  # noqa: BLE001 - e.g. more shared memory than there is: the others are told
                found[name] = repr(error)[:80]
            finally:
                expert_products.NARROW, expert_products.WIDE, expert_products.HIGH = before
        same = sorted(name for name, out in outs.items() if torch.equal(out, outs["narrow"]))
        us = {name: each if isinstance(each, str) else round(each, 1) for name, each in found.items()}
        floor = round(used * bytes_of_expert / rate, 1)
        print(json.dumps({"rows": rows, "experts": used, "floor_us": floor, "us": us, "same_bits": same}), flush=True)


if __name__ == "__main__":
    main()
