"""What kills and changes of size cost on GPUs, in one run of one server: gaps, tokens prefilled again, memory, graphs.

    python -m benchmarks.gpu_kills [--layers 12] [--ranks 2] [--redundancy 2] [--gpu-exchange] [--spares 0]
                                   [--kills 20] [--warm-kills 2] [--scales 2] [--streams 32] [--limit 420]
    python -m benchmarks.gpu_kills --layers 48 --ready 300 --streams 64 --decode 1,64 --prefill --timed ...
    python -m benchmarks.gpu_kills --device cpu --kills 4 --streams 4       (a small checkpoint: does all of it work?)

The checkpoint is `benchmarks.gpu`'s, with a word per token. Streams run without an end, and every answer is compared
with that of before the first kill. Ranks are killed by turns at a random moment, each once all serve again;
`--kills 50` is the soak. No more kills begin once `--limit` seconds have passed. Before that, on request: rates of
decoding and of long prompts (`gpu_decode.py`), and where the time of a step goes (`--timed`, `gpu_worker.py`). Prints
JSON lines, one per kill as it goes, so that a run that was cut tells what it saw; times are milliseconds, beyond the
median gap between two tokens of a stream without a fault where a name ends in `_beyond`:

    next_beyond    of requests elsewhere: from SIGKILL until their next token
    others_beyond  of requests elsewhere: the gap in which the rank was killed
    later_beyond   of requests elsewhere: their longest gap from then on until 1 s after full strength
    own_beyond     of requests of the dead rank: the gap in which it was killed
    again          tokens of a request of the dead rank that had been computed and were not read from what it left
    full           from SIGKILL until as many ranks as before step together
    recorded       CUDA graphs that ranks recorded which lived before

At the end come the lines of the ranks' logs that say what loads were made of, and which graphs were recorded.
Exit 1 if a request was lost, duplicated or altered.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SMALL, make, write_tokenizer
from benchmarks.gpu import VOCABULARY, say
from benchmarks.gpu_checkpoint import LONGEST, make_checkpoint
from benchmarks.gpu_decode import decode, prefill
from benchmarks.raw_streams import RawStreams
from benchmarks.recovery_cluster import History, OurCluster
from benchmarks.recovery_roles import WORKER
from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.target.waiting import until
from chaos.workload.history import RequestRecord, compare, percentile
from membership.base.events import Event

SAID = (
    "device_taken", "model_loaded", "view_prepared", "experts_placed", "experts_end_with_their_rank",
    "experts_of_others_not_reached", "experts_of_a_slot_not_reached", "kv_cache_ends_with_its_rank", "kv_pool_not_kept",
    "step_recorded", "steps_are_not_recorded", "steps_timed", "serving_is_not_recorded", "no_gpu_exchange",
)  # fmt: skip
STEADY_S = 4.0
SETTLE_S = 1.0  # after full strength: what the successor still holds up
PROMPT = 128


@dataclass(frozen=True)
class Kill:
    """One rank's death. Times are seconds of the monotonic clock."""

    rank: int
    at: float
    full_at: float
    masked_ms: float
    recovered_ms: float
    moved: frozenset[str]
    read: int  # tokens that were read from what it left
    salvages_ms: tuple[float, ...]
    recorded: int


class Scene:
    """The served cluster, its history, and the streams."""

    def __init__(self, cluster: ServedCluster, arguments: argparse.Namespace, vocabulary: int) -> None:
        self.cluster, self.arguments = cluster, arguments
        self.history = History(cluster.state.events)
        self.chance = random.Random(arguments.seed)
        draw = [[self.chance.randrange(4, vocabulary) for _ in range(PROMPT)] for _ in range(arguments.streams)]
        self._prompts, self._name = draw, cluster.model_name()

    def streams(self, count: int = 0) -> RawStreams:
        """All prompts, or the first ones, one a stream, again and again."""
        count = count or self.arguments.streams
        return RawStreams(self.cluster.url, self._name, self._prompts[:count], count, self.arguments.tokens)

    def pids(self) -> dict[int, int]:
        """By rank."""
        return {rank["rank"]: rank["pid"] for rank in self.cluster.status()["ranks"]}

    def recorded(self, pids: set[int]) -> int:
        """How many graphs these processes have recorded so far, by their logs."""
        found = 0
        for log in self.cluster.state.path.rglob("*.log"):
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                if '"step_recorded"' in line:
                    found += json.loads(line[line.index("{") :]).get("pid") in pids
        return found

    def said(self) -> Iterator[dict[str, Any]]:
        """What ranks said of their loads, and of memory that they did not get."""
        for log in self.cluster.state.path.rglob("*.log"):
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                if any(f'"{name}"' in line for name in SAID):
                    yield json.loads(line[line.index("{") :])

    def until_flowing(self, streams: RawStreams) -> None:
        """Wait until most streams are in the midst of an answer: they end and begin all the time, and with many of
        them there is always a prompt that the others wait for."""
        wanted = max(1, round(0.6 * self.arguments.streams))
        until(lambda: streams.flowing() >= wanted, lambda: f"{wanted} streams", 60.0, poll_s=0.01)

    def until_spared(self) -> None:
        """Wait until as many spares as wanted are ready: else a kill would be one without a spare."""
        wanted = self.arguments.spares
        until(lambda: self.cluster.status().get("spares", {}).get("ready", 0) >= wanted, f"{wanted} spares", 60.0)


def gpu_memory() -> list[int]:
    """MiB in use on each GPU; empty without one."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=30, check=True).stdout
    except FileNotFoundError:
        return []
    return [int(line) for line in said.splitlines()]


def kill_one(scene: Scene, rank: int) -> Kill:
    """SIGKILL it at a random moment, and wait for full strength."""
    pids = scene.pids()
    before = scene.recorded(set(pids.values()) - {pids[rank]})
    time.sleep(scene.chance.uniform(0.2, 0.5))
    mark = scene.history.mark()
    at = kill(pids[rank]).at

    def of_victim(kind: str) -> Event:
        return scene.history.wait(mark, f"{kind} of rank {rank}", lambda e: e.kind == kind and e.rank == rank)

    masked = of_victim("rank_masked")
    full = scene.history.wait_adopted(mark, scene.arguments.ranks, f"after the death of rank {rank}", 120.0)
    recovered = of_victim("rank_recovered")
    time.sleep(SETTLE_S)
    scene.history.mark()
    read = [e for e in scene.history.events[mark:] if e.kind == "request_salvaged" and e.fields["source"] == rank]
    return Kill(
        rank, at, scene.history.when(full), masked.fields["ms"], recovered.fields["ms"],
        frozenset(masked.fields["request_ids"]), sum(e.fields["tokens"] for e in read),
        tuple(e.fields["ms"] for e in read), scene.recorded(set(pids.values()) - {pids[rank]}) - before,
    )  # fmt: skip


def gaps(records: Sequence[RequestRecord], since: float, until_: float) -> list[float]:
    """Milliseconds of the gaps between tokens that overlap this time."""
    return [
        (b - a) * 1000 for record in records for a, b in pairwise(record.token_times) if b > since and a < until_
    ]  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of a row's values."""
    found = {name: round(percentile(values, q), 2) for name, q in (("p50", 0.5), ("p99", 0.99), ("most", 1.0))}
    return found | {"n": len(values)}


def felt(kill: Kill, records: Sequence[RequestRecord], usual_ms: float) -> dict[str, list[float]]:
    """What each request that ran at a kill felt of it."""
    found: dict[str, list[float]] = {
        name: [] for name in ("next_beyond", "others_beyond", "later_beyond", "own_beyond", "again")
    }
    until_s = kill.full_at + SETTLE_S
    for record in records:
        spanning = next(((a, b) for a, b in pairwise(record.token_times) if a <= kill.at < b), None)
        if spanning is None:
            continue
        gap = (spanning[1] - spanning[0]) * 1000 - usual_ms
        if f"{record.id}-0" in kill.moved:
            found["own_beyond"].append(gap)
            found["again"].append(PROMPT - 1 + sum(each <= kill.at for each in record.token_times))
        else:
            found["others_beyond"].append(gap)
            found["next_beyond"].append((spanning[1] - kill.at) * 1000 - usual_ms)
            found["later_beyond"].append(max(gaps([record], spanning[1], until_s), default=0) - usual_ms)
    computed = sum(found["again"])
    found["again"] = [max(0.0, computed - kill.read) / len(found["again"])] if found["again"] else []
    return found


def report_kills(what: str, kills: Sequence[Kill], records: Sequence[RequestRecord], usual_ms: float) -> None:
    """A line per kill, and one for all of them together."""
    together: dict[str, list[float]] = {}
    for death in kills:
        figures = felt(death, records, usual_ms)
        known = {
            "masked": [death.masked_ms], "recovered": [death.recovered_ms], "full": [(death.full_at - death.at) * 1000],
            "recorded": [float(death.recorded)], "salvage": list(death.salvages_ms),
        }  # fmt: skip
        for name, values in (figures | known).items():
            together.setdefault(name, []).extend(values)
        most = {name: round(max(values), 2) for name, values in (figures | known).items() if values}
        say(f"{what}: one, the most of each", rank=death.rank, requests=len(death.moved), read=death.read, **most)
    say(what, count=len(kills), **{name: spread(values) for name, values in together.items() if values})


def scale(scene: Scene, target: int) -> dict[str, Any]:
    """To that many ranks and no further; what it took, to be completed once the streams were read."""
    pids = set(scene.pids().values())
    before, mark, began = scene.recorded(pids), scene.history.mark(), time.monotonic()
    scene.cluster.scale(target)
    adopted = scene.history.wait_adopted(mark, target, f"after a change to {target} ranks")
    time.sleep(SETTLE_S)
    left = pids & set(scene.pids().values())
    return {
        "to": target, "began": began, "over": scene.history.when(adopted), "pause_ms": adopted.fields["pause_ms"],
        "recorded": scene.recorded(left) - before if left == pids else scene.recorded(left),
        "moved": sum(e.kind == "request_moved" for e in scene.history.events[mark:]),
    }  # fmt: skip


def report_scales(changes: Sequence[dict[str, Any]], records: Sequence[RequestRecord], usual_ms: float) -> None:
    """A line per change of size."""
    for change in changes:
        began, over = change.pop("began"), change.pop("over")
        longest = max(gaps(records, began, over + SETTLE_S), default=0.0)
        say("scale", **change, took_ms=round((over - began) * 1000), longest_gap_beyond=round(longest - usual_ms, 2))


def measure(scene: Scene, begun: float) -> bool:
    """What was asked for; whether nothing was lost, duplicated or altered."""
    arguments = scene.arguments
    if arguments.decode:
        decode(scene.streams, [int(count) for count in arguments.decode.split(",")], say)
    if arguments.prefill:
        prefill(scene.cluster.url, arguments.vocabulary, say)
    if arguments.timed:
        say_logs(scene)
    return not arguments.kills + arguments.warm_kills + arguments.scales or faults(scene, begun)


def killed(scene: Scene, rank: int, number: int, begun: float) -> Kill:
    """One more kill, told at once."""
    death = kill_one(scene, rank)
    say(
        "killed", number=number, rank=rank, masked=death.masked_ms, recovered=death.recovered_ms,
        full=round((death.full_at - death.at) * 1000), requests=len(death.moved), read=death.read,
        recorded=death.recorded, memory=gpu_memory(), at_s=round(time.monotonic() - begun, 1),
    )  # fmt: skip
    return death


def faults(scene: Scene, begun: float) -> bool:
    """All parts, with the same streams; whether nothing was lost, duplicated or altered."""
    arguments = scene.arguments
    for _ in range(3):  # kernels are compiled, and graphs recorded
        first = scene.streams().once()
    oracle = {record.prompt: record for record in first}
    streams = scene.streams()
    streams.start()
    scene.until_flowing(streams)
    kills: dict[str, list[Kill]] = {"warm": [], "kills": []}
    for name, count in (("warm", arguments.warm_kills), ("kills", arguments.kills)):
        if name == "kills":
            memory, steady = gpu_memory(), time.monotonic()
            time.sleep(STEADY_S)
            steady_end = time.monotonic()
        for number in range(count):
            if time.monotonic() > begun + arguments.limit:
                say("out of time", part=name, done=number, of=count)
                break
            scene.until_spared()
            scene.until_flowing(streams)
            kills[name].append(killed(scene, number % arguments.ranks, number, begun))
    scene.cluster.wait_serving(arguments.ranks)
    after, changes = gpu_memory(), list[dict[str, Any]]()
    for target in (1, arguments.ranks) * arguments.scales:
        scene.until_flowing(streams)
        changes.append(scale(scene, target))
    records = streams.stop()
    usual_ms = percentile(gaps(records, steady, steady_end), 0.5)
    say(
        "steady", gap=spread(gaps(records, steady, steady_end)),
        tokens_per_s=round(sum(steady < at < steady_end for r in records for at in r.token_times) / STEADY_S),
    )  # fmt: skip
    report_kills("first kills", kills["warm"], records, usual_ms)
    report_kills("kills", kills["kills"], records, usual_ms)
    report_scales(changes, records, usual_ms)
    say("gpu memory, MiB", before=memory, after=after)
    verdict = compare(records, oracle)
    counts = {kind: verdict.count(kind) for kind in ("lost", "duplicated", "altered")}
    tokens = sum(len(record.tokens) for record in records)
    say("requests", of=verdict.requests, tokens=tokens, **counts, examples=verdict.explained(5))
    for kind in ("gpu_exchange_off", "step_setback", "spare_lost", "rank_quarantined"):
        seen = [event.fields for event in scene.cluster.events() if event.kind == kind]
        if seen:
            say("event", kind=kind, times=len(seen), last=seen[-1])
    say_logs(scene)
    return verdict.ok


def say_logs(scene: Scene) -> None:
    """What the ranks said so far."""
    for line in sorted(scene.said(), key=lambda line: str(line.get("timestamp"))):
        say("log", **line)


def served(arguments: argparse.Namespace, model: Path) -> ServedCluster:
    """The cluster; enter it."""
    flags = [
        "--redundancy", f"{arguments.redundancy:g}", "--device", arguments.device, "--exactness", "invariant",
        "--max-model-len", str(LONGEST if arguments.prefill else 1024), "--no-prefix-cache",
        "--ready-timeout", f"{arguments.ready:g}s",
        "--spares", str(arguments.spares), *arguments.flag,
        "--gpu-exchange", str(arguments.ranks if arguments.gpu_exchange else 0),
    ]  # fmt: skip
    if arguments.timed:
        os.environ[WORKER] = "benchmarks.gpu_worker:TimedWorker"
    return OurCluster(model, arguments.ranks, flags=flags)  # in which each death is the first: no backoff grows


def checkpoint(arguments: argparse.Namespace, model: Path) -> int:
    """Make it; how many words it knows."""
    if arguments.device == "cpu":
        make(model, SMALL)
        return SMALL.vocabulary
    model.mkdir()
    make_checkpoint(model, arguments.layers, arguments.vocabulary)
    write_tokenizer(model, arguments.vocabulary)
    return int(arguments.vocabulary)


def main() -> None:
    """Print one JSON line per result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("layers", 12), ("ranks", 2), ("spares", 0), ("kills", 20), ("warm-kills", 2), ("scales", 2), ("streams", 32),
        ("tokens", 256), ("seed", 1), ("vocabulary", VOCABULARY),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--redundancy", type=float, default=2.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpu-exchange", action="store_true", help="rows travel between GPUs in decode steps")
    parser.add_argument("--decode", default="", help="numbers of streams, with commas, whose rates are measured first")
    parser.add_argument("--prefill", action="store_true", help="prompts of 4,095 tokens, too")
    parser.add_argument("--timed", action="store_true", help="ranks log where the time of decode steps goes")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds after which no kill begins")
    parser.add_argument("--ready", type=float, default=170.0, help="seconds after which it prints why it is not")
    parser.add_argument("--flag", action="append", default=[], help="of `elastic serve`, as --flag=--no-kv-pools")
    arguments = parser.parse_args()
    gc.disable()  # a collection would be seen as a gap
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        model = Path(folder) / "model"
        vocabulary = checkpoint(arguments, model)
        made_s, started = time.monotonic() - begun, time.monotonic()
        with served(arguments, model) as cluster:
            cluster.wait_serving(arguments.ranks, arguments.ready)
            options = {
                name: getattr(arguments, name) for name in ("layers", "ranks", "redundancy", "spares", "streams")
            }
            say("ready", ready_s=round(time.monotonic() - started, 1), checkpoint_s=round(made_s, 1), **options)
            held = measure(Scene(cluster, arguments, vocabulary), begun)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
