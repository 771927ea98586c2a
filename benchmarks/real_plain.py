"""Plain transformers in a process of its own, which computes only while it is asked to: the other side of `real.py`."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

DEADLINE_S = 300.0
CONTEXT = 32  # of the streams that it decodes


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


class Plain:
    """Owns the process; a context manager."""

    def __init__(self, path: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=plain_main, args=(theirs, path, threads), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join(30.0)

    def decode(self, streams: int, steps: int) -> list[float]:
        """Seconds of each step of these many streams, which go on where they were."""
        return self._ask((streams, steps, []))

    def prefill(self, tokens: list[int]) -> float:
        """Seconds to the first token."""
        return self._ask((0, 1, tokens))[0]

    def _ask(self, asked: tuple[int, int, list[int]]) -> list[float]:
        self._pipe.send(asked)
        found: list[float] = self._receive()
        return found

    def _receive(self) -> Any:
        if not self._pipe.poll(DEADLINE_S):
            raise TimeoutError(f"transformers did not answer within {DEADLINE_S:.0f} s")
        return self._pipe.recv()
