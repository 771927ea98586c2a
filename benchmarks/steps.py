"""How long short prompts wait for their first token while another client sends long ones.

    python -m benchmarks.steps [--model DIR] [--rounds 3] [--longs 200] [--long 700] [--shorts 20] [--budget 0.1]

Two served clusters of two ranks, one with a step budget and one with 512 tokens a step, take turns in one run, so that
a busy machine slows both alike. In a round one client asks for all the long prompts at once; another asks for short
ones, one after the other. One JSON line per side, with the tokens per second of all long prompts together, and one with
the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.prefix import VOCABULARY, first_token_ms
from chaos.target.cluster import ServedCluster
from chaos.workload.history import percentile
from elastic.demo.model import shipped_demo_model

RANKS, SHORT, LONG_ANSWER = 2, 20, 16
LONG_TIMEOUT_S = 1800.0  # of one long prompt, which waits for all before it
PATIENT = ("--max-wait", f"{LONG_TIMEOUT_S:.0f}s")


def prompt(chance: random.Random, tokens: int) -> list[int]:
    """One that has nothing in common with others."""
    return [chance.choice(VOCABULARY) for _ in range(tokens)]


class Longs:
    """Long prompts, all asked for at once. A context manager: what has not ended is given up at its end."""

    def __init__(self, cluster: ServedCluster, prompts: list[list[int]]) -> None:
        model = cluster.model_name()
        self._url = f"{cluster.url}/v1/completions"
        self._bodies = [
            {"model": model, "prompt": each, "max_tokens": LONG_ANSWER, "ignore_eos": True, "stream": True}
            for each in prompts
        ]
        self._begun = threading.Event()  # the first of them has its first token
        self._loop = asyncio.new_event_loop()
        self._all: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Longs:
        self._began = time.monotonic()
        self._done: Future[None] = self._thread.submit(self._loop.run_until_complete, self._run())
        if not self._begun.wait(120.0):
            raise TimeoutError("no long prompt had its first token within 120 s")
        return self

    def __exit__(self, *_: object) -> None:
        if self._all is not None and not self._done.done():
            self._loop.call_soon_threadsafe(self._all.cancel)
        with suppress(asyncio.CancelledError):
            self._done.result(60.0)
        self._thread.shutdown()
        self._loop.close()

    @property
    def over(self) -> bool:
        """Whether all have ended."""
        return self._done.done()

    def wait(self) -> float:
        """Until all have ended; seconds since they were asked for."""
        self._done.result(LONG_TIMEOUT_S)
        return time.monotonic() - self._began

    async def _run(self) -> None:
        self._all = asyncio.current_task()
        limits = httpx.Limits(max_connections=len(self._bodies))
        async with httpx.AsyncClient(timeout=LONG_TIMEOUT_S, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._ask(client, body) for body in self._bodies))

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with client.stream("POST", self._url, json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    self._begun.set()


def shorts_beside(cluster: ServedCluster, longs: Longs, shorts: int, chance: random.Random) -> list[float]:
    """Milliseconds to the first token of short prompts, one after the other, as long as long ones are under way."""
    found = []
    while len(found) < shorts and not longs.over:
        found.append(first_token_ms(cluster, prompt(chance, SHORT)))
    return found


def main() -> None:
    """Serve both, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shipped_demo_model())
    for name, default in (("rounds", 3), ("longs", 200), ("long", 700), ("shorts", 20), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budget", type=float, default=0.1, help="seconds")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    sides = {"budget": f"{args.budget:g}", "512 tokens": "0"}
    times: dict[str, list[float]] = {side: [] for side in sides}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    with ExitStack() as opened:
        clusters = {
            side: opened.enter_context(ServedCluster(args.model, RANKS, flags=("--step-budget", budget, *PATIENT)))
            for side, budget in sides.items()
        }
        for cluster in clusters.values():
            cluster.wait_serving(RANKS)
        for _ in range(args.rounds):
            for side, cluster in clusters.items():
                with Longs(cluster, [prompt(chance, args.long) for _ in range(args.longs)]) as longs:
                    times[side] += shorts_beside(cluster, longs, args.shorts, chance)
                    rates[side].append(args.longs * (args.long + LONG_ANSWER) / longs.wait())
    if few := [side for side, found in times.items() if len(found) < 2]:
        parser.error(f"the long prompts ended before two short ones were answered ({', '.join(few)}): more --longs")
    p99s = {}
    for side, found in times.items():
        p99s[side] = percentile(found, 0.99)
        row = {"side": side, "shorts": len(found), "TTFT p50 ms": round(statistics.median(found), 1)}
        row |= {"TTFT p99 ms": round(p99s[side], 1), "p99 in budgets": round(p99s[side] / args.budget / 1000, 1)}
        print(json.dumps(row | {"tokens/s": round(statistics.median(rates[side]))}), flush=True)
    rate, other = (statistics.median(found) for found in rates.values())
    ratios = {"p99, budget / 512 tokens": round(p99s["budget"] / p99s["512 tokens"], 3)}
    print(json.dumps(ratios | {"tokens/s, budget / 512 tokens": round(rate / other, 3)}), flush=True)


if __name__ == "__main__":
    main()
