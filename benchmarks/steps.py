"""How long short prompts wait for their first token while another client sends long ones.

    python -m benchmarks.steps [--model DIR] [--rounds 3] [--longs 200] [--long 700] [--shorts 20] [--budget 0.1]

Two served clusters of two ranks, one with a step budget and one with 512 tokens a step, take turns in one run, so that
a busy machine slows both alike. In a round one client asks for all the long prompts at once; another asks for short
ones, one after the other, until the last has its first token. One JSON line per side and one with the ratio.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

from benchmarks.prefix import VOCABULARY, first_token_ms, stream
from chaos.target.cluster import ServedCluster
from elastic.demo.model import shipped_demo_model

RANKS, SHORT, LONG_ANSWER = 2, 20, 16
LONG_TIMEOUT_S = 1800.0  # of one long prompt, which waits for all before it


def prompt(chance: random.Random, tokens: int) -> list[int]:
    """One that has nothing in common with others."""
    return [chance.choice(VOCABULARY) for _ in range(tokens)]


def shorts_beside_longs(cluster: ServedCluster, args: argparse.Namespace, chance: random.Random) -> list[float]:
    """Milliseconds to the first token of each short prompt, asked for while long ones are under way."""
    longs = [prompt(chance, args.long) for _ in range(args.longs)]
    begun = threading.Event()

    def ask(tokens: list[int]) -> None:
        for number, _ in enumerate(stream(cluster, tokens, LONG_ANSWER, LONG_TIMEOUT_S)):
            if number:
                begun.set()

    with ThreadPoolExecutor(args.longs) as pool:
        running = [pool.submit(ask, each) for each in longs]
        if not begun.wait(120.0):
            raise TimeoutError("no long prompt had its first token within 120 s")
        found = []
        while len(found) < args.shorts and not all(each.done() for each in running):
            found.append(first_token_ms(cluster, prompt(chance, SHORT)))
        wait(running)
        for each in running:
            each.result()
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
    with ExitStack() as opened:
        clusters = {
            side: opened.enter_context(ServedCluster(args.model, RANKS, flags=("--step-budget", budget)))
            for side, budget in sides.items()
        }
        for cluster in clusters.values():
            cluster.wait_serving(RANKS)
        for _ in range(args.rounds):
            for side, cluster in clusters.items():
                times[side] += shorts_beside_longs(cluster, args, chance)
    if few := [side for side, found in times.items() if len(found) < 2]:
        parser.error(f"the long prompts ended before two short ones were answered ({', '.join(few)}): more --longs")
    p99s = {}
    for side, found in times.items():
        p99s[side] = statistics.quantiles(found, n=100, method="inclusive")[98]
        row = {"side": side, "shorts": len(found), "TTFT p50 ms": round(statistics.median(found), 1)}
        row |= {"TTFT p99 ms": round(p99s[side], 1), "p99 in budgets": round(p99s[side] / args.budget / 1000, 1)}
        print(json.dumps(row), flush=True)
    print(json.dumps({"p99, budget / 512 tokens": round(p99s["budget"] / p99s["512 tokens"], 3)}), flush=True)


if __name__ == "__main__":
    main()
