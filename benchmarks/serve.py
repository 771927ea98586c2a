"""Tokens per second of our model runner against plain transformers' batched decode, in one process and interleaved.

    python -m benchmarks.serve [--model DIR] [--streams 1,8,32] [--dtype D] [--context 128]

Each engine decodes the same number of streams for the same number of steps after the same prompt. Rounds of all engines
alternate, so that a busy machine slows all alike; the median step of each is reported. One compute thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

BLOCK = 16
Step = Callable[[], object]


def opened(path: str, dtype: str, exactness: str, blocks: int, total: int, device: str) -> Any:
    """Our runner with all experts, and a cache of so many blocks."""
    from membership.base.enums import Exactness
    from tests.support.local_exchange import LocalExchange
    from workers.model.devices import open_backend
    from workers.model.expert_bank import LocalExpertBank
    from workers.model.load import load_model
    from workers.model.runner import ModelRunner

    loaded = load_model(path, dtype, open_backend(device))
    bank = LocalExpertBank()
    runner = ModelRunner(loaded, bank, Exactness(exactness), kv_blocks=blocks, block_size=BLOCK, max_len=total)
    bank.load_all([(layer, e) for layer in range(loaded.info.moe_layers) for e in range(loaded.info.experts)])
    runner.attach(LocalExchange(bank))
    return runner


def prompt_step(path: str, exactness: str, rows: int, start: int, device: str) -> Step:
    """A step of our runner with a piece of a prompt: `rows` tokens from `start` on, again and again."""
    from workers.protocol.messages import SeqChunk

    total = start + rows
    blocks = -(-total // BLOCK)
    runner = opened(path, "auto", exactness, blocks, total, device)
    tokens = [prompt_token(0, i) for i in range(total)]

    def step() -> object:
        return runner.run([SeqChunk(0, start, tokens[start:], [*range(blocks)])])

    return step


def ours(path: str, dtype: str, exactness: str, streams: int, context: int, total: int, device: str = "cpu") -> Step:
    """A decode step of our runner for `streams` sequences that have `context` tokens already."""
    from workers.protocol.messages import Sampling, SeqChunk

    per_seq = -(-total // BLOCK)
    runner = opened(path, dtype, exactness, streams * per_seq, total, device)
    blocks = [list(range(s * per_seq, (s + 1) * per_seq)) for s in range(streams)]
    last = [prompt_token(s, context - 1) for s in range(streams)]
    for s in range(streams):
        tokens = [prompt_token(s, i) for i in range(context)]
        last[s] = runner.run([SeqChunk(s, 0, tokens, blocks[s], Sampling())])[0].token
    position = context

    def step() -> object:
        nonlocal position, last
        chunks = [SeqChunk(s, position, [last[s]], blocks[s], Sampling()) for s in range(streams)]
        last = [sampled.token for sampled in runner.run(chunks)]
        position += 1
        return last

    return step


def load_plain(path: str, dtype: str) -> Any:
    """The model as transformers runs it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype)).eval()


def plain(model: Any, streams: int, context: int) -> Step:
    """A decode step of transformers as `generate` does it: a batch, a growing cache, greedy."""
    import torch

    prompt = torch.tensor([[prompt_token(s, i) for i in range(context)] for s in range(streams)])
    with torch.inference_mode():
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    past, last = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def step() -> object:
        nonlocal past, last
        out = model(input_ids=last, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, last = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        return last

    return step


def over_ranks(stack: ExitStack, path: str, args: argparse.Namespace, streams: int, total: int) -> Step:
    """A decode step of two rank processes in invariant mode, each expert on one of them."""
    from benchmarks.serve_ranks import Ranks, decode_step
    from membership.store.records import ClusterConfig
    from workers.model.families import read_model_info

    info = read_model_info(path)
    per_seq = -(-total // BLOCK)
    config = ClusterConfig(
        cluster="b", model=path, served_model_name="b", moe_layers=info.moe_layers, experts=info.experts,
        redundancy=args.redundancy, dtype=args.dtype, kv_blocks=-(-streams // 2) * per_seq, max_model_len=total,
    )  # fmt: skip
    ranks = Ranks(config, 2)
    stack.callback(ranks.close)
    return decode_step(ranks, streams, args.context, per_seq, prompt_token)


def prompt_token(stream: int, position: int) -> int:
    """A fixed, varied prompt."""
    return 2 + (stream * 7919 + position * 104729) % 900


def measure(args: argparse.Namespace, streams: int) -> dict[str, Any]:
    """Median milliseconds per step and tokens per second of each engine."""
    path, dtype, context = args.model, args.dtype, args.context
    total = context + args.steps * args.rounds + 4
    with ExitStack() as stack:
        engines: dict[str, Step] = {
            "transformers": plain(load_plain(path, dtype), streams, context),
            "stock": ours(path, dtype, "stock", streams, context, total),
            "invariant": ours(path, dtype, "invariant", streams, context, total),
        }
        if args.ranks:
            engines["2 ranks"] = over_ranks(stack, path, args, streams, total)
        return report(interleave(engines, args.steps, args.rounds), streams)


def interleave(engines: dict[str, Step], steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every step, the engines taking turns."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for step in engines.values():
        step()
    for _ in range(rounds):
        for name, step in engines.items():
            for _ in range(steps):
                started = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - started)
    return times


def report(times: dict[str, list[float]], streams: int) -> dict[str, Any]:
    """One line of results."""
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "streams": streams,
        **{f"{name} ms": round(1000 * t, 3) for name, t in medians.items()},
        **{f"{name} tok/s": round(streams / t) for name, t in medians.items()},
        "stock vs transformers": round(medians["transformers"] / medians["stock"], 2),
        "invariant vs stock": round(medians["invariant"] / medians["stock"], 2),
    }


def main() -> None:
    """Parse, measure, print one JSON line per batch size."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "elastic" / "demo" / "checkpoint"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--redundancy", type=float, default=1.0)
    parser.add_argument("--no-ranks", dest="ranks", action="store_false", help="leave out the two rank processes")
    args = parser.parse_args()
    for streams in map(int, args.streams.split(",")):
        print(json.dumps(measure(args, streams)), flush=True)


if __name__ == "__main__":
    main()
