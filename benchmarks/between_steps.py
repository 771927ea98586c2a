"""What the host computes between two decode steps: a GPU waits for it (docs/gpu.md, "between").

    python -m benchmarks.between_steps [--streams 64] [--ranks 2] [--context 500] [--steps 300] [--rounds 5]
                                       [--vocabulary 1024] [--temperature 0] [--logprobs 0] [--parent DIR] [--profile]

The engine's own loop, scheduler and codec drive ranks that answer at once, in one process. Processor time per step, in
microseconds, medians of steps:

    take     decode the ranks' answers
    decide   from there until the next step is given to its queue: tokens taken in, members looked at, chunks made
    send     encode that step
    behind   what the engine does while ranks compute it: tokens handed out, status, requests taken
    rank     decode a step and lay it out, on one rank
    sample   choose its tokens from logits that are there; with `--logprobs -1` and greedy that is one call of torch

All but `behind` are between two steps' computation. `--parent`: the same of another tree (`git worktree add DIR
COMMIT`), in turns with ours, and the ratio. `--profile`: where `decide` goes, by cProfile.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from elastic.engine.loop import Engine, Peers
from elastic.protocol import Submit
from membership.base.rank_id import RankId
from membership.store.records import ClusterConfig, ClusterState, Member, View
from workers.model.attention_plan import plan_step
from workers.model.sampler import sample
from workers.protocol.messages import (
    EngineMessage,
    RankMessage,
    SampledToken,
    Sampling,
    StepBatch,
    StepResult,
    StepStatus,
)
from workers.queue.codec import MsgpackCodec

TOKEN, BLOCK, WARM = 7, 16, 40
PARTS = ("take", "decide", "send", "rank", "sample", "behind")
CPU = torch.device("cpu")
now_ns = time.thread_time_ns


class Ranks:
    """All that an engine talks to. Ranks answer each step at once, with tokens that end nothing."""

    def __init__(self, view: View, logits: torch.Tensor) -> None:
        self._logits = logits
        self._members = {member.rank: member.id for member in view.members}
        self.near = frozenset(self._members.values())
        self._steps, self._answers = MsgpackCodec(EngineMessage), MsgpackCodec(RankMessage)
        self._sent = b""
        self._since = now_ns()  # the last part's end
        self.took: dict[str, list[int]] = defaultdict(list)
        self.profile: cProfile.Profile | None = None
        self.slow: dict[int, float] = {}
        self.awaited = frozenset[RankId]()
        self.fenced = self.pending = False

    def broadcast(self, batch: StepBatch) -> None:
        """The end of `decide`."""
        if self.profile is not None:
            self.profile.disable()
        self._note("decide")
        self._sent = bytes(self._steps.encode(batch)[0])
        self._note("send")

    def collect(self, timeout_s: float, or_when: object) -> list[StepResult]:
        """The end of `behind`."""
        self._note("behind")
        answers = []
        for rank, key in self._members.items():
            self._since = now_ns()
            batch: StepBatch = self._steps.decode(self._sent, ())
            chunks = batch.ranks[rank]
            plan_step(chunks, BLOCK, len(chunks), CPU, tiled=False)
            if not rank:
                self._note("rank")
            asked = [chunk for chunk in chunks if chunk.sample is not None]
            if len(asked) == len(self._logits):
                settings = [chunk.sample for chunk in asked]
                drawn = sample(self._logits, settings, [chunk.start + 1 for chunk in asked])
                tokens = [SampledToken(c.seq, d.token, d.logprobs) for c, d in zip(asked, drawn, strict=True)]
            else:
                tokens = [SampledToken(chunk.seq, 5) for chunk in asked]
            answers.append(
                StepResult(
                    rank, key.incarnation, TOKEN, batch.epoch, batch.step, batch.attempt, StepStatus.OK, tokens=tokens
                )
            )
            if not rank:
                self._note("sample")
        encoded = [bytes(self._answers.encode(answer)[0]) for answer in answers]
        self._since = now_ns()
        decoded = [self._answers.decode(each, ()) for each in encoded]
        self._note("take")
        if self.profile is not None:
            self.profile.enable()
        return decoded

    def _note(self, part: str) -> None:
        now = now_ns()
        self.took[part].append(now - self._since)
        self._since = now_ns()

    def take(self) -> list[Submit]:
        """No request comes."""
        return []

    def far_links(self) -> dict[RankId, object]:
        """All ranks are here."""
        return {}

    def ignore(self, *args: object, **fields: object) -> None:
        """It costs nothing here."""

    send = mask = update = emit = meet = ring = probe = publish_loads = ignore


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds of each part, of this tree."""
    ranks, per_rank = options.ranks, options.streams // options.ranks
    total = options.context + options.steps + 2 * WARM + 64
    config = ClusterConfig(
        cluster="c", model="m", served_model_name="m", moe_layers=4, experts=8, block_size=BLOCK,
        kv_blocks=(per_rank + 1) * (total // BLOCK + 2), max_seqs=max(per_rank, 8), max_batched_tokens=2048,
        max_model_len=total, vocab_size=options.vocabulary, gpu_exchange=ranks if ranks > 1 else 0,
    )  # fmt: skip
    half = [tuple(expert for expert in range(8) if expert % ranks == rank) for rank in range(ranks)]
    view = View(
        epoch=1, members=tuple(Member(rank=rank, node="n", incarnation=rank + 1) for rank in range(ranks)),
        placement={rank: (half[rank],) * 4 for rank in range(ranks)},
    )  # fmt: skip
    peers: Any = Ranks(view, torch.randn(per_rank, options.vocabulary, generator=torch.Generator().manual_seed(1)))
    mirror: Any = SimpleNamespace(state=lambda: ClusterState(revision=1, engine_token=TOKEN), staleness_s=0.0)
    engine = Engine(config, TOKEN, Peers(mirror, peers, peers, peers, peers))
    engine._scheduler.set_view(view, (), time.monotonic())
    for number in range(options.streams):
        prompt = [(number * 7 + at) % 900 for at in range(options.context)]
        sampling = Sampling(temperature=options.temperature, seed=number, logprobs=options.logprobs)
        engine._scheduler.submit(
            Submit(f"request-{number}", prompt, sampling, total - options.context, ignore_eos=True), time.monotonic()
        )
    while any(each.remaining > 1 for each in engine._scheduler._sequences.values()) or not engine._scheduler.running:
        engine.turn()
    for _ in range(WARM):
        engine.turn()
    peers.took.clear()
    if options.profile:
        peers.profile = cProfile.Profile(time.thread_time_ns, 1e-9)
    for _ in range(options.steps):
        engine.turn()
    if peers.profile is not None:
        pstats.Stats(peers.profile).sort_stats("tottime").print_stats(25)
    return {part: round(statistics.median(peers.took[part]) / 1000, 1) for part in PARTS}


def between(row: dict[str, float]) -> float:
    """What a GPU waits for."""
    return sum(row[part] for part in PARTS if part != "behind")


def of_tree(tree: Path, arguments: list[str]) -> dict[str, float]:
    """The same, by a process that imports another tree."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--one"]
    environ = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environ, capture_output=True, encoding="utf-8", check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    """Measure, print a row per side, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("streams", 64), ("ranks", 2), ("context", 500), ("steps", 300), ("vocabulary", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--logprobs", type=int, default=0, help="-1: none")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parent", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one or options.profile:
        print(json.dumps(measure(options)))
        return
    given = "streams", "ranks", "context", "steps", "vocabulary", "logprobs", "temperature"
    arguments = [f"--{name}={getattr(options, name)}" for name in given]
    trees = {"ours": Path(__file__).resolve().parents[1], **({"parent": options.parent} if options.parent else {})}
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(options.rounds):
        for side, tree in trees.items():
            rows[side].append(of_tree(tree.resolve(), arguments))
    sums = {side: statistics.median(map(between, found)) for side, found in rows.items()}
    for side, found in rows.items():
        medians = {part: round(statistics.median(row[part] for row in found), 1) for part in PARTS}
        print(json.dumps({"side": side, **medians, "between_us": round(sums[side], 1)}), flush=True)
    if options.parent:
        print(json.dumps({"between, ours / parent": round(sums["ours"] / sums["parent"], 3)}), flush=True)


if __name__ == "__main__":
    main()
