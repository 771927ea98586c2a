"""What the gateway takes of a processor per token streamed, bare and with all that people switch on.

    python -m benchmarks.gateway_cost [--streams 32] [--tokens 256] [--rounds 6] [--parent DIR]

Two clusters of one rank serve the demo model: one as it comes, and one with API keys, an access log, and its metrics
read once per second. Rounds of streams go to the two in turn, and of each gateway's process the time is counted. What
it takes depends on how many tokens arrive at once, so both get the same requests. `--parent`: a third one is served
bare from another tree, to compare a change with what was before (`git worktree add DIR COMMIT`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil

from chaos.target.cluster import ServedCluster
from membership.base.process_stats import command_words

MODEL = Path(__file__).resolve().parents[1] / "elastic" / "demo" / "checkpoint"
KEY = "a-key-of-nobody-in-particular"
SILENCE_S = 120.0
SCRAPE_S = 1.0
BARE, FULL, PARENT = "bare", "with keys, access log, metrics", "bare, parent"


def gateway_of(cluster: ServedCluster) -> psutil.Process:
    """Its process."""
    for child in psutil.Process(cluster.pid).children(recursive=True):
        if "gateway" in command_words(child.pid):
            return child
    raise LookupError("the cluster has no gateway")


def spent_s(process: psutil.Process) -> float:
    """What it has had of a processor."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def stream(port: int, number: int, tokens: int) -> int:
    """One request of so many tokens; returns how many parts came."""
    body = {"model": "demo", "prompt": f"Number {number}: what is a", "max_tokens": tokens, "ignore_eos": True}
    text = json.dumps(body | {"temperature": 0, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
        f"Content-Length: {len(text)}\r\n\r\n"
    )
    async with asyncio.timeout(SILENCE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + text)
            answer = await reader.read()
        finally:
            writer.close()
    if b"data: [DONE]" not in answer[-64:]:
        raise ConnectionError(f"a stream was cut: {answer[:300]!r}")
    return answer.count(b"data: {")


async def scrape(url: str) -> None:
    """Read the metrics again and again."""
    async with httpx.AsyncClient(timeout=SILENCE_S, trust_env=False) as client:
        while True:
            (await client.get(f"{url}/metrics")).raise_for_status()
            await asyncio.sleep(SCRAPE_S)


async def one_round(cluster: ServedCluster, streams: int, tokens: int, *, scraped: bool) -> None:
    """All streams at once, to their end."""
    scraping = asyncio.create_task(scrape(cluster.url)) if scraped else None
    try:
        await asyncio.gather(*(stream(cluster.port, number, tokens) for number in range(streams)))
    finally:
        if scraping is not None:
            scraping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await scraping


def main() -> None:
    """Serve both, ask them in turn, print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("streams", 32), ("tokens", 256), ("rounds", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--parent", type=Path)
    args = parser.parse_args()
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        keys = folder / "keys"
        keys.write_text(f"somebody:{KEY}\n", encoding="utf-8")
        keys.chmod(0o600)
        flags = {BARE: (), FULL: ("--api-key-file", str(keys), "--access-log")} | ({PARENT: ()} if args.parent else {})
        there = {"PYTHONPATH": str(args.parent), "PYTHONSAFEPATH": "1"}  # else the folder we are in comes first
        clusters = {}
        for name, more in flags.items():
            environ = there if name == PARENT else {}
            cluster = ServedCluster(MODEL, 1, flags=("--served-model-name", "demo", *more), environ=environ)
            clusters[name] = ends.enter_context(cluster)
        for cluster in clusters.values():
            cluster.wait_serving(1, SILENCE_S * 3)
        taken: dict[str, list[float]] = {name: [] for name in clusters}
        for number in range(args.rounds + 1):
            for name, cluster in clusters.items():
                gateway = gateway_of(cluster)
                before = spent_s(gateway)
                asyncio.run(one_round(cluster, args.streams, args.tokens, scraped=bool(flags[name])))
                if number:  # the first one warms up
                    taken[name].append((spent_s(gateway) - before) / (args.streams * args.tokens) * 1e6)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    for name, each in taken.items():
        print(json.dumps({"gateway": name, "us_per_token": [round(one, 1) for one in each]}))
    ratios = {f"{name}, to bare": round(each / medians[BARE], 3) for name, each in medians.items() if name != BARE}
    print(json.dumps({"streams": args.streams, "median_us": {n: round(m, 1) for n, m in medians.items()}} | ratios))


if __name__ == "__main__":
    main()
