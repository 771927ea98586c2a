"""Whole product on GPUs: is a prompt's text the same in any company, and how fast; transformers beside it.

    python -m benchmarks.gpu [--layers 12] [--ranks 2] [--redundancy 2] [--exactness invariant,stock] [--gpu-exchange]

Makes a checkpoint of Qwen3-30B-A3B's shape (fewer layers, a small vocabulary, random weights), serves it, and asks the
same prompts: 32 at once three times, 8 at once, each alone, and 32 while a rank is killed, `--kills` times. Prints one
JSON line each, and what the engine said of steps that went wrong.
With `--prefill`: how long prompts of 4,095 tokens take.
Two ranks with redundancy 2 each hold all experts; with 1 each holds half, and rows travel between them.
Rates are per run: transformers decodes the same prompts after the server has ended, since both want the GPU's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_checkpoint import LONGEST, QwenShape, make_checkpoint

VOCABULARY = QwenShape.vocabulary
URL = "http://127.0.0.1:8000"
READY_S = 300.0
PREFILLED = LONGEST - 1


def say(what: str, **fields: object) -> None:
    print(json.dumps({"what": what, **fields}), flush=True)


def prompt(number: int) -> str:
    return f"stream {number} says that the number {number * 7919}"


class Server:
    """One `elastic serve`, ended with the block."""

    def __init__(self, model: Path, arguments: argparse.Namespace, exactness: str, folder: Path) -> None:
        self._ranks = arguments.ranks
        self.model, self.state, self.log = model, folder / f"state-{exactness}", folder / f"serve-{exactness}.log"
        self._command = [
            sys.executable, "-m", "elastic.cli", "serve", str(model), "--ranks", str(arguments.ranks),
            "--redundancy", f"{arguments.redundancy:g}", "--device", arguments.device,
            "--state-dir", str(self.state), "--exactness", exactness,
            "--max-model-len", str(LONGEST if arguments.prefill else 1024), "--ready-timeout", f"{READY_S:g}s",
            "--gpu-exchange", str(arguments.ranks if arguments.gpu_exchange else 0),
        ]  # fmt: skip

    def __enter__(self) -> Server:
        self._output = self.log.open("w", encoding="utf-8")
        begun = time.monotonic()
        self._process = subprocess.Popen(self._command, stdout=self._output, stderr=self._output)
        import httpx

        while True:
            if self._process.poll() is not None or time.monotonic() > begun + READY_S:
                say("not ready", log=self.log.read_text(encoding="utf-8")[-4000:])
                raise SystemExit(1)
            try:
                if httpx.get(f"{URL}/readyz", timeout=2, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        self.ready_s = time.monotonic() - begun
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._output.close()

    def _asked(self, *what: str) -> str:
        """What a command of ours prints."""
        command = [sys.executable, "-m", "elastic.cli", *what, "-o", "json", "--state-dir", str(self.state)]
        return subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=60, check=True
        ).stdout  # fmt: skip

    def last_pid(self) -> int:
        """Of the rank with the highest number, once all serve."""
        deadline = time.monotonic() + READY_S
        while True:
            ranks = json.loads(self._asked("status"))["ranks"]
            if len(ranks) == self._ranks and all(rank["state"] == "serving" for rank in ranks):
                return int(max(ranks, key=lambda rank: rank["rank"])["pid"])
            if time.monotonic() > deadline:
                raise SystemExit(f"not all ranks serve again: {ranks}")
            time.sleep(0.2)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """What happened so far, of these kinds."""
        events = [json.loads(line) for line in self._asked("events").splitlines()]
        return [event for event in events if event["kind"] in kinds]


async def texts(
    numbers: range, tokens: int, during: Callable[[], Awaitable[None]] | None = None
) -> tuple[list[str], float]:
    """What each prompt is answered, all asked at once, and the seconds that took."""
    import httpx

    async with httpx.AsyncClient(timeout=300, trust_env=False, limits=httpx.Limits(max_connections=100)) as client:

        async def ask(number: int) -> str:
            body = {"model": "m", "prompt": prompt(number), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            answer = await client.post(f"{URL}/v1/completions", json=body | {"model": model_name})
            return str(answer.raise_for_status().json()["choices"][0]["text"])

        model_name = (await client.get(f"{URL}/v1/models")).json()["data"][0]["id"]
        begun = time.monotonic()
        jobs = [asyncio.create_task(ask(number)) for number in numbers]
        if during is not None:
            await during()
        return list(await asyncio.gather(*jobs)), time.monotonic() - begun


def measure(server: Server, exactness: str, tokens: int, kills: int) -> None:
    """All runs of one server."""
    for count in (2, 32, 32, 32):  # kernels are compiled, and graphs recorded
        asyncio.run(texts(range(count), 8))
    first, seconds = asyncio.run(texts(range(32), tokens))
    seconds_of_32 = seconds
    say(
        "32 streams",
        exactness=exactness,
        tokens_per_s=round(32 * tokens / seconds, 1),
        ready_s=round(server.ready_s, 1),
    )
    alone, seconds = [], 0.0
    for number in range(8):
        found, took = asyncio.run(texts(range(number, number + 1), tokens))
        alone += found
        seconds += took
    say("1 stream", exactness=exactness, tokens_per_s=round(8 * tokens / seconds, 1))
    runs = {"alone": alone}
    for name in ("second", "third"):
        runs[name], _ = asyncio.run(texts(range(32), tokens))
    runs["8 at once"], _ = asyncio.run(texts(range(8), tokens))
    for number in range(kills):
        pid = server.last_pid()

        async def kill(pid: int = pid) -> None:
            await asyncio.sleep(seconds_of_32 / 3)
            os.kill(pid, signal.SIGKILL)

        runs[f"a rank killed, {number + 1}"], _ = asyncio.run(texts(range(32), tokens, kill))
    for name, found in runs.items():
        same = sum(a == b for a, b in zip(first, found, strict=False))
        say(f"same text as the first run: {name}", exactness=exactness, same=same, of=len(found))
    for event in server.events("gpu_exchange_used", "gpu_exchange_off", "rank_masked", "step_setback"):
        known = event | event["fields"]
        said = {name: known[name] for name in ("kind", "epoch", "rank", "ms", "status", "reason") if known.get(name)}
        say("event", exactness=exactness, **said)


async def answered(url: str, prompts: list[list[int]]) -> float:
    """How many seconds it takes to answer these with one token each, all asked at once."""
    import httpx

    async with httpx.AsyncClient(timeout=300, trust_env=False) as client:
        name = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
        begun = time.monotonic()
        bodies = [{"model": name, "prompt": each, "max_tokens": 1, "temperature": 0} for each in prompts]
        for answer in await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for body in bodies)):
            answer.raise_for_status()
        return time.monotonic() - begun


def prefill(server: Server, exactness: str) -> None:
    """Prompts of PREFILLED tokens, none of which begins as another: one after the other, and three at once."""
    import random

    draw = random.Random(5)
    prompts = [[draw.randrange(4, VOCABULARY) for _ in range(PREFILLED)] for _ in range(9)]
    asyncio.run(answered(URL, prompts[:1]))  # kernels are compiled
    alone = sorted(asyncio.run(answered(URL, [each])) for each in prompts[1:6])
    together = asyncio.run(answered(URL, prompts[6:]))
    say(
        "prefill", exactness=exactness, prompt_tokens=PREFILLED, ready_s=round(server.ready_s, 1),
        seconds_alone=[round(each, 3) for each in alone], tokens_per_s_alone=round(PREFILLED / alone[2]),
        tokens_per_s_three_at_once=round(3 * PREFILLED / together),
    )  # fmt: skip


def transformers_rate(model: Path, tokens: int, device: str) -> None:
    """Batched greedy decode of transformers, prefill and the first tokens left out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token_id = 1
    for kind in ("grouped_mm", "batched_mm"):
        made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, experts_implementation=kind).to(device)
        for streams in (1, 32):
            given = tokenizer([prompt(n) for n in range(streams)], return_tensors="pt", padding=True).to(device)
            rates = []
            for length in (tokens, tokens, 2 * tokens):
                begun = time.monotonic()
                made.generate(**given, max_new_tokens=length, min_new_tokens=length, do_sample=False)
                rates.append(time.monotonic() - begun)
            rate = streams * tokens / max(1e-9, rates[2] - rates[1])
            say(f"transformers {kind}, {streams} streams", tokens_per_s=round(rate, 1))
        del made
        if device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Print one JSON line per result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--redundancy", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--exactness", default="invariant,stock")
    parser.add_argument("--gpu-exchange", action="store_true", help="rows travel between GPUs in decode steps")
    parser.add_argument("--prefill", action="store_true", help="long prompts, instead of all else")
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--no-transformers", action="store_true")
    arguments = parser.parse_args()
    import torch
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    say("machine", gpu=name, **versions, layers=arguments.layers, redundancy=arguments.redundancy)
    with tempfile.TemporaryDirectory(prefix="gpu-") as made:
        folder = Path(made)
        model = folder / "model"
        model.mkdir()
        begun = time.monotonic()
        make_checkpoint(model, arguments.layers)
        say("checkpoint", seconds=round(time.monotonic() - begun, 1))
        for exactness in arguments.exactness.split(","):
            with Server(model, arguments, exactness, folder) as server:
                if arguments.prefill:
                    prefill(server, exactness)
                else:
                    measure(server, exactness, arguments.tokens, arguments.kills)
        if not arguments.no_transformers:
            transformers_rate(model, arguments.tokens, arguments.device)


if __name__ == "__main__":
    main()
