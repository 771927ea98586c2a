"""Many lives, one after the other on each processor, until there were enough faults; and some of them twice.

A life that comes out otherwise the second time, in another process, would make every other verdict worthless.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from itertools import count

import msgspec

from chaos.simulation.life import Life, live

BATCH = 20  # lives that a process is given at a time
AGAIN = 1  # of the batch before, to see whether they come out the same
BATCH_LIMIT_S = 600.0
SHOWN = 10


class SimulationReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the lives proved; `violations` are (seed, what broke), and each can be replayed alone."""

    ok: bool
    seed: int
    lives: int
    faults: int
    faults_per_minute: int
    kinds: dict[str, int]  # in how many lives a kind of fault or change could happen
    epochs: int
    requests: int
    tokens: int
    refused: int
    replayed: int
    seconds: float
    violations: tuple[tuple[int, str], ...] = ()


def simulate(seed: int, faults: int, jobs: int, tell: Callable[[int, int], None]) -> SimulationReceipt:
    """Lives from `seed` on, in `jobs` processes, until there were `faults`; `tell` hears (lives, faults) meanwhile."""
    began, lives = time.monotonic(), dict[int, Life]()
    violations, replayed, made = list[tuple[int, str]](), 0, 0
    for batch in _batches(seed, jobs):
        for life in batch:
            replayed += life.seed in lives
            if lives.setdefault(life.seed, life) != life:
                violations.append((life.seed, "another outcome when it was lived again"))
            elif life.violation:
                violations.append((life.seed, life.violation))
        made = sum(life.faults for life in lives.values())
        tell(len(lives), made)
        if made >= faults:
            break
    return _receipt(seed, list(lives.values()), violations, replayed, time.monotonic() - began)


def _batches(seed: int, jobs: int) -> Generator[list[Life], None, None]:
    """Batch after batch, for ever, in the order of their seeds."""
    starts = count(seed, BATCH)
    yield _batch(next(starts), again=0)
    if jobs == 1:
        yield from map(_batch, starts)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = deque(pool.submit(_batch, next(starts)) for _ in range(2 * jobs))
        try:
            while True:
                yield running.popleft().result(timeout=BATCH_LIMIT_S)
                running.append(pool.submit(_batch, next(starts)))
        finally:
            pool.shutdown(cancel_futures=True)


def _batch(start: int, again: int = AGAIN) -> list[Life]:
    """Some lives, and the first `again` of the batch before, which another process may have lived."""
    return [live(seed) for seed in (*range(start, start + BATCH), *range(start - BATCH, start - BATCH + again))]


def _receipt(
    seed: int, lives: list[Life], violations: list[tuple[int, str]], replayed: int, seconds: float
) -> SimulationReceipt:
    made = sum(life.faults for life in lives)
    return SimulationReceipt(
        ok=not violations,
        seed=seed,
        lives=len(lives),
        faults=made,
        faults_per_minute=round(60 * made / seconds),
        kinds=dict(sorted(Counter(kind for life in lives for kind in life.kinds).items())),
        epochs=sum(life.epochs for life in lives),
        requests=sum(life.requests for life in lives),
        tokens=sum(life.tokens for life in lives),
        refused=sum(life.refused for life in lives),
        replayed=replayed,
        seconds=round(seconds, 1),
        violations=tuple(violations[:SHOWN]),
    )
