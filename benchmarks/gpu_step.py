"""One decode step of a rank that holds all experts, on a GPU, without a server: milliseconds, and where they go.

    python -m benchmarks.gpu_step [--layers 8] [--streams 1,8,32] [--prompts 128,2048] [--exactness invariant,stock]
                                  [--profile]

`--prompts`: also steps with so many tokens of a prompt, after 2,048 others. Uses the checkpoint of `benchmarks.gpu`.
`--profile` adds the longest operations of a step, on the host and on the GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import say
from benchmarks.gpu_checkpoint import make_checkpoint
from benchmarks.serve import Step, ours, prompt_step

WARM, TIMED = 5, 30
START = 2048


def _timed(step: Step) -> float:
    import torch

    begun = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begun)


def _profile(step: Step) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            step()
    events = seen.key_averages()
    for order in ("self_cpu_time_total", "self_cuda_time_total"):
        print(events.table(sort_by=order, row_limit=18, max_name_column_width=44), flush=True)


def _report(step: Step, arguments: argparse.Namespace, **what: object) -> None:
    for _ in range(WARM):
        step()
    ms = round(statistics.median([_timed(step) for _ in range(TIMED)]), 2)
    say("step", **what, layers=arguments.layers, median_ms=ms)
    if arguments.profile:
        _profile(step)


def main() -> None:
    """Print one JSON line per number of streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--prompts", default="")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--exactness", default="invariant,stock")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-") as made:
        model = Path(made)
        make_checkpoint(model, arguments.layers)
        for exactness in arguments.exactness.split(","):
            for rows in map(int, filter(None, arguments.prompts.split(","))):
                _report(prompt_step(str(model), exactness, rows, START, arguments.device), arguments, prompt=rows)
            for streams in map(int, filter(None, arguments.streams.split(","))):
                total = arguments.context + WARM + TIMED + 4
                step = ours(str(model), "auto", exactness, streams, arguments.context, total, arguments.device)
                _report(step, arguments, exactness=exactness, streams=streams)


if __name__ == "__main__":
    main()
