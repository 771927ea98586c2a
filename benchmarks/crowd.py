"""Thousands of clients at once: is each answered, is the queue bounded, and does the service hold no more afterwards?

    python -m benchmarks.crowd [--streams 2000] [--beyond 4000] [--shorts 10000] [--at-once 256]

Three crowds meet one `elastic serve` of the demo model: as many streams as may wait, more than may wait, and many
requests of one token. Before, between and after them each process's memory, open files and threads are looked at.
The clients are one asyncio loop with plain sockets, since a client library would cost more than the service.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chaos.target.cluster import ServedCluster
from chaos.target.footprint import SETTLED_S, growth, look
from chaos.target.waiting import until
from membership.base.descriptors import raise_limit

MODEL = Path(__file__).resolve().parents[1] / "elastic" / "demo" / "checkpoint"
SILENCE_S = 600.0  # of one client, on a machine that is busy
SPARE_REQUESTS = 48  # that may wait beyond `--streams`
WARM = 200  # requests before the first look


@dataclass
class Crowd:
    """What came of one crowd."""

    answers: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)  # until the first byte of those that were answered
    refused_s: list[float] = field(default_factory=list)  # until those were that were not

    def said(self, seconds: float) -> dict[str, object]:
        """For the report."""
        return {
            "answers": dict(sorted(self.answers.items())),
            "seconds": round(seconds, 1),
            "first_byte_p50_s": round(statistics.median(self.first_s), 2) if self.first_s else None,
            "first_byte_max_s": round(max(self.first_s, default=0.0), 2),
            "refused_max_s": round(max(self.refused_s, default=0.0), 2),
        }


async def ask(port: int, number: int, tokens: int, crowd: Crowd, *, stream: bool) -> None:
    """One request on a connection of its own, and how it was answered."""
    prompt = f"Number {number} of a crowd asks: what is a"
    body = {"model": "crowd", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
    text = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    began = time.monotonic()
    try:
        async with asyncio.timeout(SILENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head.encode() + text)
                beginning = await reader.readline()
                first_s = time.monotonic() - began
                rest = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        crowd.answers[type(error).__name__] += 1
        return
    answer = verdict(beginning, rest, stream=stream)
    crowd.answers[answer] += 1
    (crowd.first_s if answer == "whole" else crowd.refused_s).append(first_s)


def verdict(beginning: bytes, rest: bytes, *, stream: bool) -> str:
    """What a client got, in a word."""
    status = beginning[9:12].decode(errors="replace")
    headers, _, content = rest.partition(b"\r\n\r\n")
    if status == "200":
        return "whole" if not stream or b"data: [DONE]" in content[-64:] else "cut"
    return f"{status} with Retry-After" if b"retry-after:" in headers.lower() else status or "nothing"


async def at_once(port: int, count: int, tokens: int) -> Crowd:
    """All of them now."""
    crowd = Crowd()
    await asyncio.gather(*(ask(port, n, tokens, crowd, stream=True) for n in range(count)))
    return crowd


async def one_after_the_other(port: int, count: int, places: int) -> Crowd:
    """Requests of one token, so many of them at a time."""
    crowd, numbers = Crowd(), iter(range(count))

    async def client(mine: Iterator[int]) -> None:
        for number in mine:
            await ask(port, number, 1, crowd, stream=False)

    await asyncio.gather(*(client(numbers) for _ in range(places)))
    return crowd


def open_requests(cluster: ServedCluster) -> int:
    """How many run or wait."""
    requests = cluster.status()["requests"]
    return int(requests["running"] + requests["waiting"])


def crowds(cluster: ServedCluster, args: argparse.Namespace) -> None:
    """Let them come, and print what each of them and the whole gave."""
    asyncio.run(one_after_the_other(cluster.port, WARM, 16))
    time.sleep(SETTLED_S)  # a process that is younger is not looked at
    looks = [(0, look(cluster.pid))]
    done = 0
    for name, count in (
        ("streams", args.streams), ("beyond", args.beyond), ("shorts", args.shorts), ("streams again", args.streams),
    ):  # fmt: skip
        began = time.monotonic()
        if name == "shorts":
            crowd = asyncio.run(one_after_the_other(cluster.port, count, args.at_once))
        else:
            crowd = asyncio.run(at_once(cluster.port, count, args.tokens))
        report = {"crowd": name, "requests": count, **crowd.said(time.monotonic() - began)}
        print(json.dumps(report), flush=True)
        until(lambda: not open_requests(cluster), "no request to be open", 60.0)
        done += count
        looks.append((done, look(cluster.pid)))
    for process in growth(looks):
        per_look = [each[process.process] for _, each in looks]
        rss, files, threads = ([getattr(each, what) for each in per_look] for what in ("rss_mb", "files", "threads"))
        held = {"rss_mb": [round(each, 1) for each in rss], "files": files, "threads": threads}
        print(json.dumps({"process": process.process, **held}), flush=True)


def main() -> None:
    """Parse, serve, ask."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("streams", 2000), ("beyond", 4000), ("shorts", 10000), ("at-once", 256), ("ranks", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=8, help="of a stream")
    args = parser.parse_args()
    raise_limit()
    waiting = str(args.streams + SPARE_REQUESTS)
    flags = ("--max-waiting-requests", waiting, "--max-wait", "900s", "--served-model-name", "crowd")
    with ServedCluster(MODEL, args.ranks, flags=flags) as cluster:
        cluster.wait_serving(args.ranks)
        crowds(cluster, args)


if __name__ == "__main__":
    main()
