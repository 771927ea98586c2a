"""What the prefix cache saves: the first token of a chat's second turn, and the tokens computed again after a kill.

    python -m benchmarks.prefix [--model DIR] [--rounds 10] [--history 1000] [--context 400] [--streams 4]

Two served clusters of two ranks, one with the cache and pools that outlive ranks, one with neither, take turns in one
run, so that a busy machine slows both alike. Without --model the demo's checkpoint is served. One JSON line per row.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.recovery_cluster import History
from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.target.waiting import until
from chaos.workload.history import percentile
from elastic.demo.model import shipped_demo_model

RANKS, ANSWER, QUESTION, KILL_ANSWER = 2, 24, 16, 400  # tokens
SIDES = {"with": (), "without": ("--no-prefix-cache", "--no-kv-pools")}
VOCABULARY = range(2, 1000)


def stream(cluster: ServedCluster, prompt: list[int], tokens: int, timeout_s: float = 120.0) -> Iterator[float]:
    """When each chunk of a greedy answer came, on the monotonic clock; the first item is when it was asked for."""
    body = {
        "model": cluster.model_name(), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    asked = time.monotonic()
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=timeout_s, trust_env=False) as answer:
        answer.raise_for_status()
        yield asked
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield time.monotonic()


def first_token_ms(cluster: ServedCluster, prompt: list[int]) -> float:
    """How long a prompt's first token takes. The answer is read to its end."""
    asked, first, *_ = stream(cluster, prompt, ANSWER)
    return (first - asked) * 1000


def second_turn(clusters: dict[str, ServedCluster], history: int, rounds: int, chance: random.Random) -> dict[str, Any]:
    """A new chat in each round: its first turn, and another with what was said before it."""
    times: dict[tuple[str, int], list[float]] = {(side, turn): [] for side in clusters for turn in (1, 2)}
    for number in range(rounds + 1):
        first = [chance.choice(VOCABULARY) for _ in range(history)]
        second = first + [chance.choice(VOCABULARY) for _ in range(QUESTION)]
        for side, cluster in clusters.items():
            for turn, prompt in ((1, first), (2, second)):
                took_ms = first_token_ms(cluster, prompt)
                if number:  # the first round warms up
                    times[side, turn].append(took_ms)
    medians = {key: statistics.median(found) for key, found in times.items()}
    row: dict[str, Any] = {"row": "second turn", "history": history, "rounds": rounds}
    for side in clusters:
        row[f"{side}: first ms"] = round(medians[side, 1], 2)
        row[f"{side}: second ms"] = round(medians[side, 2], 2)
        row[f"{side}: second / first"] = round(medians[side, 2] / medians[side, 1], 3)
    return row


def computed(cluster: ServedCluster) -> int:
    """Tokens that ranks were given to compute when they got requests, since the engine began."""
    seen = cluster.client().state().engine_status
    return seen.queried_tokens - seen.cached_tokens - seen.salvaged_tokens if seen is not None else 0


@dataclass(frozen=True)
class Killed:
    """What one kill cost. Times in milliseconds."""

    moved: int  # requests that lost their home
    again: int  # tokens of theirs that were computed again
    silence: float  # the longest gap between two tokens of a stream from the kill on
    steady_p99: float  # of gaps before it
    full: float  # until as many ranks as before step together
    parts: str  # what the recovery was made up of


def killed(
    cluster: ServedCluster, context: int, streams: int, common: int, chance: random.Random, answer: int = KILL_ANSWER
) -> Killed:
    """Kill a rank under `streams` requests with this much context, of which the first `common` tokens are the same."""
    shared = [chance.choice(VOCABULARY) for _ in range(common)]
    prompts = [shared + [chance.choice(VOCABULARY) for _ in range(context - common)] for _ in range(streams)]
    gaps: list[tuple[float, float]] = []  # when it ended, and how long it was
    begun = threading.Semaphore(0)

    def follow(prompt: list[int]) -> None:
        last = 0.0
        for number, at in enumerate(stream(cluster, prompt, answer)):
            if number > 1:
                gaps.append((at, at - last))
            if number == 5:
                begun.release()
            last = at

    history = History(cluster.state.events)
    with ThreadPoolExecutor(streams) as pool:
        running = [pool.submit(follow, prompt) for prompt in prompts]
        for _ in running:
            if not begun.acquire(timeout=60.0):
                raise TimeoutError("a stream did not begin within 60 s")
        all_began = time.monotonic()
        settled = until(lambda: _unchanged(cluster), "the counts of computed tokens to be published", 30.0)
        victim = cluster.status()["ranks"][0]
        mark = history.mark()
        at = kill(victim["pid"]).at
        masked = history.wait(
            mark, "the mask", lambda e: e.kind == "rank_masked" and e.fields["incarnation"] == victim["incarnation"]
        )
        for each in running:
            each.result(timeout=120.0)
    again = until(lambda: _unchanged(cluster), "the counts of computed tokens to be published", 30.0) - settled
    full = history.wait_adopted(mark, RANKS, "after the kill")
    over = history.wait(mark, "the recovery", lambda e: e.kind == "rank_recovered" and e.rank == victim["rank"])
    parts = _parts(over.fields, [e.fields for e in history.events[mark:] if e.kind == "request_salvaged"])
    flips = [
        f"{1000 * (history.when(e) - at):.0f} ms (pause of {e.fields['pause_ms']:.0f})"
        for e in history.events[mark:]
        if e.kind == "epoch_adopted"
    ]
    cluster.wait_serving(RANKS)
    steady = [1000 * gap for ended, gap in gaps if all_began < ended - gap and ended < at]
    gap, ended = max(((gap, ended) for ended, gap in gaps if ended > at), default=(0.0, at))
    silence = 1000 * gap
    parts += f"; the longest gap ended after {1000 * (ended - at):.0f} ms, flips after {', '.join(flips)}"
    full_ms = 1000 * (history.when(full) - at)
    return Killed(masked.fields["requests"], again, silence, percentile(steady, 0.99), full_ms, parts)


def _parts(recovered: dict[str, Any], read: list[dict[str, Any]]) -> str:
    """Where the time from the detection to the last request's next token went."""
    rest_ms = recovered["ms"] - recovered["in_flight_ms"] - recovered["wait_ms"]
    return (
        f"{recovered['steps']} steps: {recovered['in_flight_ms']:.0f} ms left of the one under way, waited"
        f" {recovered['wait_ms']:.0f} ms (longest read {max((each['ms'] for each in read), default=0.0):.0f} ms), "
        f"then {rest_ms:.0f} ms"
    )


def _unchanged(cluster: ServedCluster) -> int:
    """The count, if it was published twice (once a second); else 0."""
    before = computed(cluster)
    time.sleep(2.2)
    return before if computed(cluster) == before else 0


def kills(
    clusters: dict[str, ServedCluster], args: argparse.Namespace, chance: random.Random
) -> Iterator[dict[str, Any]]:
    """One row for contexts that have nothing in common, one for contexts that share all but their end."""
    for common in (0, args.context - 32):
        row: dict[str, Any] = {"row": "kill", "streams": args.streams, "context": args.context, "in common": common}
        for side, cluster in clusters.items():
            found = [killed(cluster, args.context, args.streams, common, chance) for _ in range(args.kills)]
            moved = sum(each.moved for each in found)
            row[f"{side}: tokens computed again per request"] = round(sum(f.again for f in found) / max(1, moved))
            row[f"{side}: longest silence ms"] = round(statistics.median(f.silence for f in found), 1)
        yield row


def main() -> None:
    """Serve both, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shipped_demo_model())
    for name, default in (
        ("rounds", 10),
        ("history", 1000),
        ("context", 400),
        ("streams", 4),
        ("kills", 3),
        ("seed", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with ExitStack() as opened:
        clusters = {
            side: opened.enter_context(ServedCluster(args.model, RANKS, flags=flags)) for side, flags in SIDES.items()
        }
        for cluster in clusters.values():
            cluster.wait_serving(RANKS)
        print(json.dumps(second_turn(clusters, args.history, args.rounds, chance)), flush=True)
        for row in kills(clusters, args, chance):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
