"""The promises with a model of real size: 1.4 B parameters with random weights, two ranks, other engines beside it.

    python -m benchmarks.real [--small] [--rows load,decode,prefill,turns,shorts,kill,memory,flip] [--path DIR] [--json]

Makes the checkpoint (`--path` keeps it), serves it, and measures through HTTP; transformers, and llama.cpp where it is
installed (`real_llama.py` says how), have as many threads as all ranks together and take turns with the service. At
most ten minutes on two cores. `--small`: a checkpoint of 28 MB, to
see that all of it works. `--large`: OLMoE-1B-7B with half of its layers, 7.1 GB. Prints the table, or with `--json` a
JSON line per row.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.checkpoints import OLMOE_HALF, SMALL, Shape, make
from benchmarks.prefix import RANKS, first_token_ms, killed, second_turn, stream
from benchmarks.real_aside import CONTEXT, Aside
from benchmarks.real_llama import READY_S, llama_main, missing
from benchmarks.real_load import Load, compiled, conditions, loaded
from benchmarks.real_memory import available, memory
from benchmarks.real_plain import plain_main
from benchmarks.recovery_cluster import History
from benchmarks.recovery_report import say
from benchmarks.steps import PATIENT, Longs, prompt, shorts_beside
from chaos.target.cluster import ServedCluster
from chaos.workload.history import percentile

LONG_TIMEOUT_S = 600.0
KILL_CONTEXT, KILL_STREAMS, KILL_ANSWER = 400, 4, 200
FLIP_ANSWER = 2000  # more tokens than come meanwhile
# Least speed of ours beside theirs at decoding and at prefill; None: no aim, only told.
AIMS: dict[str, tuple[float, float | None]] = {"transformers": (1.1, 1.0), "llama.cpp": (0.8, None)}
BUDGET_MS = 100.0  # of a step, in which two of the targets are given


@dataclass(frozen=True)
class Row:
    """One line of the table. `other`: what the same took or yielded elsewhere, measured in turns."""

    what: str
    value: float
    unit: str
    target: str
    ok: bool
    other: str = ""

    def text(self) -> str:
        """As markdown."""
        measured, holds = f"{self.value:g} {self.unit}".strip(), "yes" if self.ok else "no"
        return f"| {self.what} | {measured} | {self.other} | {self.target} | {holds} |"


def at_most(what: str, value: float, unit: str, most: float, other: str = "") -> Row:
    """A row whose target is a bound from above."""
    return Row(what, round(value, 3), unit, f"<= {most:g} {unit}".strip(), value <= most, other)


def at_least(what: str, value: float, unit: str, least: float | None, other: str = "") -> Row:
    """A row whose target is a bound from below, if it has one."""
    if least is None:
        return Row(what, round(value, 3), unit, "", True, other)
    return Row(what, round(value, 3), unit, f">= {least:g} {unit}".strip(), value >= least, other)


@dataclass(frozen=True)
class Scene:
    """What is measured: the service, the others beside it, and how much of each."""

    cluster: ServedCluster
    asides: list[Aside]
    load: Load
    before: int  # bytes that the machine had left
    args: argparse.Namespace
    chance: random.Random


def rows_load(scene: Scene) -> Iterator[Row]:
    """What it took until the service was ready."""
    load = scene.load
    yield at_most("load, 2 ranks, ready", load.ready_s, "s", 12.0, f"{load.nbytes / 1e9:.2f} GB")
    yield at_most("evictions while loading", load.deaths, "", 0)
    yield at_most("bytes read / bytes of the checkpoint", load.read / load.nbytes, "", 1.05)
    yield at_most("peak anonymous memory per rank", load.anonymous / 1e9, "GB", 0.4)


def rate(cluster: ServedCluster, prompts: list[list[int]], tokens: int) -> float:
    """Tokens per second of streams that decode side by side, from when the last has begun until the first ends."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda each: list(stream(cluster, each, tokens, LONG_TIMEOUT_S))[1:], prompts))
    if any(len(times) != tokens for times in found):
        raise RuntimeError(f"a stream came in {[len(times) for times in found]} pieces, not one per token")
    began, ended = max(times[0] for times in found), min(times[-1] for times in found)
    return sum(began < at <= ended for times in found for at in times) / (ended - began)


def rows_decode(scene: Scene) -> Iterator[Row]:
    """Tokens per second, in turns."""
    for streams in (1, 8, 32):
        prompts = [prompt(scene.chance, CONTEXT) for _ in range(streams)]
        ours, theirs = list[float](), {aside.name: list[float]() for aside in scene.asides}
        for number in range(scene.args.rounds + 1):
            found = rate(scene.cluster, prompts, scene.args.steps + CONTEXT // 2)
            steps = {aside.name: aside.decode(streams, scene.args.steps) for aside in scene.asides}
            if number:  # the first round warms up
                ours.append(found)
                for name, took in steps.items():
                    theirs[name].append(streams / statistics.median(took))
        mine = statistics.median(ours)
        for name, rates in theirs.items():
            other = statistics.median(rates)
            beside = f"{mine:.1f} tokens/s, {name} {other:.1f}"
            yield at_least(f"decode, {streams} streams / {name}", mine / other, "", AIMS[name][0], beside)


def rows_prefill(scene: Scene) -> Iterator[Row]:
    """Time to the first token of 1,024, in turns."""
    ours, theirs = list[float](), {aside.name: list[float]() for aside in scene.asides}
    for number in range(scene.args.rounds + 1):
        tokens = prompt(scene.chance, 1024)
        asked, first, *_ = stream(scene.cluster, tokens, 1)
        took = {aside.name: aside.prefill(tokens) for aside in scene.asides}
        if number:
            ours.append(first - asked)
            for name, took_s in took.items():
                theirs[name].append(took_s)
    mine = statistics.median(ours)
    for name, times in theirs.items():
        other = statistics.median(times)
        beside = f"{mine:.2f} s, {name} {other:.2f} s"
        yield at_least(f"prefill of 1,024 tokens, speed / {name}", other / mine, "", AIMS[name][1], beside)


def rows_turns(scene: Scene) -> Iterator[Row]:
    """The second turn of a chat."""
    found = second_turn({"ours": scene.cluster}, 1000, scene.args.rounds, scene.chance)
    beside = f"{found['ours: second ms']:.0f} ms, first {found['ours: first ms']:.0f} ms"
    ratio = found["ours: second / first"]
    yield at_most("second turn after 1,000 tokens, first token / first turn's", ratio, "", 0.1, beside)


def rows_shorts(scene: Scene) -> Iterator[Row]:
    """Short prompts beside 200 long ones, which are given up at the end."""
    longs = [prompt(scene.chance, 700) for _ in range(scene.args.longs)]
    with Longs(scene.cluster, longs) as under_way:
        found = shorts_beside(scene.cluster, under_way, scene.args.shorts, scene.chance)
    idle = statistics.median(first_token_ms(scene.cluster, prompt(scene.chance, 20)) for _ in range(3))
    beside = f"n {len(found)}, p50 {percentile(found, 0.5):.0f} ms, alone {idle:.0f} ms"
    what = f"short prompt beside {len(longs)} long ones, first token p99"
    yield at_most(what, percentile(found, 0.99), "ms", 5 * BUDGET_MS, beside)


def rows_kill(scene: Scene) -> Iterator[Row]:
    """Kills of a rank under streams."""
    how = KILL_CONTEXT, KILL_STREAMS, 0, scene.chance, KILL_ANSWER
    found = [killed(scene.cluster, *how) for _ in range(scene.args.kills)]
    for each in found:
        beside = f"silence {each.silence:.0f} ms, steady p99 {each.steady_p99:.0f} ms, full {each.full:.0f} ms"
        say(f"kill: {beside}; {each.parts}")
    worst = max(found, key=lambda each: each.silence - each.steady_p99)
    beside = f"silence {worst.silence:.0f} ms, steady p99 {worst.steady_p99:.0f} ms, n {len(found)}; {worst.parts}"
    yield at_most("kill: largest gap beyond steady p99", worst.silence - worst.steady_p99, "ms", 300.0, beside)
    again = max(each.again / max(1, each.moved) for each in found)
    yield at_most("kill: tokens computed again per request", again, "", 16, f"{sum(e.moved for e in found)} requests")
    yield at_most("kill: full strength again", max(each.full for each in found) / 1000, "s", 1.5)


def rows_memory(scene: Scene) -> Iterator[Row]:
    """What the machine has lost to the service, and where it is."""
    nbytes, parts = scene.load.nbytes, memory(scene.cluster.pid)
    for name, sizes in parts.items():
        beside = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in sizes.items())
        yield Row(f"memory of {name}", round(sizes.total() / 1e9, 3), "GB", "", True, beside)
    taken = scene.before - available()
    yield at_most("memory taken / bytes of the checkpoint", taken / nbytes, "", 1.5, f"{taken / 1e9:.2f} GB")


def rows_flip(scene: Scene) -> Iterator[Row]:
    """From 2 ranks to 4 under streams."""
    history, cluster = History(scene.cluster.state.events), scene.cluster
    gaps: list[tuple[float, float]] = []
    flipped = threading.Event()

    def follow(tokens: list[int]) -> None:
        last = 0.0
        for number, came in enumerate(stream(cluster, tokens, FLIP_ANSWER, LONG_TIMEOUT_S)):
            if number > 1:
                gaps.append((came, came - last))
            if flipped.is_set():
                return
            last = came

    with ThreadPoolExecutor(KILL_STREAMS) as pool:
        running = [pool.submit(follow, prompt(scene.chance, CONTEXT)) for _ in range(KILL_STREAMS)]
        mark, began = history.mark(), time.monotonic()
        try:
            cluster.scale(2 * RANKS)
            adopted = history.wait_adopted(mark, 2 * RANKS, "after the change of size")
        finally:
            flipped.set()
        for each in running:
            each.result(LONG_TIMEOUT_S)
    at = history.when(adopted)
    longest = max((gap for ended, gap in gaps if ended > began and ended - gap < at), default=0.0)
    beside = (
        f"of which its first step {adopted.fields['step_ms']:.0f} ms, longest gap of a stream {1000 * longest:.0f} ms"
    )
    beside += f", {at - began:.1f} s until 4 ranks step"
    yield at_most("flip 2 -> 4 ranks: the engine's pause", adopted.fields["pause_ms"], "ms", BUDGET_MS, beside)


ROWS: dict[str, Callable[[Scene], Iterator[Row]]] = {
    "load": rows_load, "decode": rows_decode, "prefill": rows_prefill, "turns": rows_turns, "shorts": rows_shorts,
    "kill": rows_kill, "memory": rows_memory, "flip": rows_flip,
}  # fmt: skip


def beside(path: Path, opened: ExitStack) -> Iterator[Aside]:
    """The engines that take turns with ours; llama.cpp only where it is there, and loads the model."""
    yield opened.enter_context(Aside("transformers", plain_main, str(path), RANKS))
    absent = missing()
    if not absent:
        try:
            yield opened.enter_context(Aside("llama.cpp", llama_main, str(path), RANKS, READY_S))
        except (RuntimeError, TimeoutError) as error:
            absent = str(error)
    if absent:
        say(f"llama.cpp is not compared: {absent}")


def measure(args: argparse.Namespace, path: Path, names: list[str]) -> Iterator[Row]:
    """All rows that were asked for."""
    size = f"{sum(file.stat().st_size for file in path.glob('*.safetensors')) / 1e9:.2f} GB"
    say(f"serving {size} with {RANKS} ranks")
    before = available()
    with ExitStack() as opened:
        cache = opened.enter_context(tempfile.TemporaryDirectory(prefix="elastic-ep-compiled-"))
        environ = compiled(path, Path(cache))
        say(f"({conditions(path)})")
        flags = (*PATIENT, *args.flag)
        cluster = opened.enter_context(ServedCluster(path, RANKS, flags=flags, environ=environ))
        load = loaded(cluster, path)
        asides = list(beside(path, opened)) if {"decode", "prefill"} & set(names) else []
        scene = Scene(cluster, asides, load, before, args, random.Random(args.seed))
        for name in names:
            began = time.monotonic()
            for row in ROWS[name](scene):
                say(row.text())
                yield row
            say(f"({name}: {time.monotonic() - began:.0f} s)")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_const", dest="shape", const=SMALL, default=Shape())
    size.add_argument("--large", action="store_const", dest="shape", const=OLMOE_HALF)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--path", type=Path, help="where the checkpoint is kept, or is already")
    parser.add_argument("--flag", action="append", default=[], help="of `elastic serve`, as --flag=--step-budget=0.1")
    for name, default in (("rounds", 3), ("steps", 16), ("longs", 200), ("shorts", 20), ("kills", 2), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    names = args.rows.split(",")
    if unknown := set(names) - ROWS.keys():
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    path = args.path or Path(tempfile.mkdtemp(prefix="elastic-ep-real-"))
    try:
        if not (path / "config.json").exists():
            make(path, args.shape)
        rows = []
        for row in measure(args, path, names):
            rows.append(row)
            if args.json:
                print(json.dumps(asdict(row)), flush=True)
        if not args.json:
            table = "\n".join(row.text() for row in rows)
            sys.stdout.write(f"| what | measured | beside | target | holds |\n|---|---|---|---|---|\n{table}\n")
    finally:
        if args.path is None:
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
