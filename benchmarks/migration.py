"""How soon a running request yields its next token on another rank: its KV blocks copied, or computed again there.

    python -m benchmarks.migration [--model DIR] [--contexts 64,128,256,512,1024] [--rounds 20] [--redundancy R]

Two rank processes over the real exchange. Copy and replay of the same sequence take turns in one run, so that a busy
machine slows both alike; each ends with the token after the context, which must be the same. One JSON line per context.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.serve import BLOCK, prompt_token
from benchmarks.serve_ranks import Ranks
from elastic.engine.kv_blocks import blocks_for
from membership.store.records import ClusterConfig
from workers.model.families import read_model_info
from workers.protocol.messages import Sampling, SeqChunk

SOURCE, TARGET = 0, 1


def computed(ranks: Ranks, rank: int, tokens: list[int], blocks: list[int], most: int, start: int = 0) -> int:
    """Run `tokens` from `start` on in chunks as the scheduler cuts them; the token that follows them."""
    for at in range(start, len(tokens), most):
        piece = tokens[at : at + most]
        sampling = Sampling() if at + len(piece) == len(tokens) else None
        found = ranks.run({rank: [SeqChunk(0, at, piece, blocks, sampling)]})
    return found[0]


def measure(ranks: Ranks, config: ClusterConfig, context: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds of both ways, and how many times longer a replay takes."""
    tokens = [prompt_token(0, position) for position in range(context)]
    blocks = list(range(blocks_for(context, BLOCK)))
    known = blocks_for(context - 1, BLOCK)  # the last token has not run when a request pauses
    there = [len(blocks) + block for block in blocks]
    most = config.max_batched_tokens
    expected = computed(ranks, SOURCE, tokens, blocks, most)
    times: dict[str, list[float]] = {"copy": [], "replay": []}
    for _ in range(rounds + 1):
        for way, found in times.items():
            began = time.perf_counter()
            if way == "copy":
                ranks.copy(SOURCE, TARGET, blocks[:known], there[:known])
            start = context - 1 if way == "copy" else 0
            token = computed(ranks, TARGET, tokens, there, most, start)
            found.append((time.perf_counter() - began) * 1000)
            if token != expected:
                raise RuntimeError(f"{way} of {context} tokens yields token {token} instead of {expected}")
    copy_ms, replay_ms = (statistics.median(found[1:]) for found in times.values())
    return {
        "context": context,
        "copy_ms": round(copy_ms, 2),
        "replay_ms": round(replay_ms, 2),
        "replay/copy": round(replay_ms / copy_ms, 2),
    }


def main() -> None:
    """Parse, measure, print one JSON line per context length."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "elastic" / "demo" / "checkpoint"))
    parser.add_argument("--contexts", default="64,128,256,512,1024")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--redundancy", type=float, default=2.0)
    args = parser.parse_args()
    contexts = [int(context) for context in args.contexts.split(",")]
    info = read_model_info(args.model)
    config = ClusterConfig(
        cluster="b", model=args.model, served_model_name="b", moe_layers=info.moe_layers, experts=info.experts,
        redundancy=args.redundancy, kv_blocks=2 * blocks_for(max(contexts), BLOCK), block_size=BLOCK,
        max_model_len=max(contexts) + 1,
    )  # fmt: skip
    with closing(Ranks(config, 2)) as ranks:
        for context in contexts:
            print(json.dumps(measure(ranks, config, context, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
