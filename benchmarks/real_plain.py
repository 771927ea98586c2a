"""Plain transformers beside ours: what runs in its process (`real_aside.py`)."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

from benchmarks.real_aside import CONTEXT


def plain_main(pipe: Connection, path: str, threads: int) -> None:
    """Load, then measure what is asked for: seconds of decode steps, or of a prefill."""
    import torch

    from benchmarks.serve import Step, load_plain, plain

    torch.set_num_threads(threads)
    model = load_plain(path, "auto")
    engines: dict[int, Step] = {}
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        streams, steps, tokens = asked
        if streams and streams not in engines:
            engines[streams] = plain(model, streams, CONTEXT)
            engines[streams]()
        found = []
        for _ in range(steps):
            began = time.perf_counter()
            if streams:
                engines[streams]()
            else:
                with torch.inference_mode():
                    model(input_ids=torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
            found.append(time.perf_counter() - began)
        pipe.send(found)
