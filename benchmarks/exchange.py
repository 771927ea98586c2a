"""Dispatch + combine between real processes, against `torch.distributed` gloo `all_to_all_single` in the same run.

    python -m benchmarks.exchange [--ranks 4] [--rounds 1000] [-o json]

Experts cost nothing (they return their rows), so what is measured is the exchange. All ranks call as fast as they can,
without a barrier, as in a step. The contenders take turns. The second part loses a rank that holds rows of the others,
by SIGKILL (noticed by the end of its connection) and by a stop that the live mask ends, and measures the row retry.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from membership.base.rank_id import RankId
from membership.store.records import Member, Placement, View
from workers.exchange.combine import ascending, combine
from workers.exchange.loop import Exchange
from workers.exchange.model_side import StepContext
from workers.exchange.transports import opener
from workers.ipc.doorbell import Bell, Doorbell
from workers.protocol.live_mask import LiveMask

HIDDEN, EXPERTS, TURNS = 1024, 16, 5
CASES = ((1, 2), (32, 2), (32, 8))  # tokens per rank, experts per token
TIMEOUT_S = 60.0
Times = dict[str, list[float]]


class Identity:
    """Experts that cost nothing. `fatal` is the signal that this rank sends itself when it gets rows, if any."""

    def __init__(self, held: tuple[int, ...], died_at: Any) -> None:
        self._held = frozenset(held)
        self._died_at = died_at
        self.fatal = 0

    def holds(self, layer: int, expert: int) -> bool:
        return expert in self._held

    def padded(self, rows: int) -> int:
        return rows

    def compute_many(self, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor) -> Tensor:
        if self.fatal:
            self._died_at.value = time.monotonic()
            os.kill(os.getpid(), self.fatal)
        return rows


def layout(ranks: int) -> Placement:
    """Each expert on two ranks."""
    return {r: (tuple(e for e in range(EXPERTS) if (r - e) % ranks < 2),) for r in range(ranks)}


def inputs(rank: int, tokens: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, experts and weights of one rank."""
    g = torch.Generator().manual_seed(rank)
    ids = torch.rand(tokens, EXPERTS, generator=g).argsort(dim=1)[:, :top_k]
    return torch.randn(tokens, HIDDEN, generator=g).bfloat16(), ids, torch.rand(tokens, top_k, generator=g)


class Rank:
    """One process of several with the same schedule; `gate` starts each part, `done` counts those that finished it."""

    def __init__(self, pipe: Connection, rank: int, ranks: int, shared: tuple[Any, Any, Any]) -> None:
        torch.set_num_threads(1)
        self.pipe, self.rank, self.ranks = pipe, rank, ranks
        self.gate, self.done, died_at = shared
        placement = layout(ranks)
        self.bell = Doorbell()
        self.bank = Identity(placement[rank][0], died_at)
        self.mask: LiveMask | None = None
        self.exchange = Exchange(RankId(rank, rank + 1), self.bank, self.bell, opener("shm"), self.masked)
        members = tuple(Member(rank=r, node="here", incarnation=r + 1) for r in range(ranks))
        self.view = View(epoch=1, members=members, placement=placement)
        pipe.send(self.exchange.handle())
        send_handle(pipe, self.bell.fileno(), os.getppid())
        peers, mask = pipe.recv()
        self.mask = LiveMask.attach(mask)
        self.exchange.connect(peers, TIMEOUT_S)

    def masked(self) -> int:
        return self.mask.masked() if self.mask else 0

    def call(self, tokens: int, top_k: int) -> Any:
        """What dispatch_combine is called with."""
        self.exchange.begin_step(StepContext(self.view, 1, 1, 1))
        rows, ids, weights = inputs(self.rank, tokens, top_k)
        return lambda: self.exchange.dispatch_combine(0, rows, ids, weights)

    def gloo_call(self, tokens: int, top_k: int) -> Any:
        """The same rows with two all_to_all_single whose splits are known beforehand."""
        rows, topk_ids, topk_weights = inputs(self.rank, tokens, top_k)
        ids, weights = ascending(topk_ids, topk_weights)
        of_all = [inputs(r, tokens, top_k)[1].reshape(-1) % self.ranks for r in range(self.ranks)]
        counts = [torch.bincount(owners, minlength=self.ranks) for owners in of_all]
        sent, got = counts[self.rank].tolist(), [int(c[self.rank]) for c in counts]
        order = (ids.view(-1) % self.ranks).argsort(stable=True)
        there = torch.empty(sum(got), HIDDEN, dtype=rows.dtype)
        back, outputs = (torch.empty(len(order), HIDDEN, dtype=rows.dtype) for _ in range(2))

        def run() -> Tensor:
            dist.all_to_all_single(there, rows[order // top_k], got, sent)
            dist.all_to_all_single(back, there, sent, got)
            outputs[order] = back
            return combine(outputs.view(tokens, top_k, HIDDEN), weights, rows.dtype)

        return run

    def times(self, call: Any, rounds: int) -> list[float]:
        """Seconds of each call; then serve until all ranks have finished theirs."""
        with self.done.get_lock():
            self.done.value = 0
        self.gate.wait(TIMEOUT_S)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        with self.done.get_lock():
            self.done.value += 1
        while self.done.value < self.ranks:
            self.bell.wait(self.exchange.pending, 0.01)
            self.exchange.serve()
        self.gate.wait(TIMEOUT_S)
        return seconds

    def race(self, store: str, rounds: int) -> Times:
        """All cases, shm and gloo in turns."""
        timeout = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=self.rank, world_size=self.ranks, timeout=timeout
        )
        found: Times = {}
        for tokens, top_k in CASES:
            name = f"{tokens} x top-{top_k}"
            ours, gloo = self.call(tokens, top_k), self.gloo_call(tokens, top_k)
            contenders = {"shm": (ours, rounds), "gloo": (gloo, max(rounds // 10, 1))}
            for turn in range(TURNS + 1):
                for kind, (call, count) in contenders.items():
                    times = self.times(call, count)
                    if turn:  # the first one warms up
                        found.setdefault(f"{kind} {name}", []).extend(times)
        dist.destroy_process_group()
        return found

    def loss(self, fatal: int) -> tuple[float, int]:
        """The last rank gets `fatal` with rows of the others in its hands; when the others had their results, and
        how many rows they had sent again."""
        call = self.call(32, 2)
        self.times(call, 20)
        if self.rank == self.ranks - 1:
            self.bank.fatal = fatal
            while True:
                self.bell.wait(self.exchange.pending, TIMEOUT_S)
                self.exchange.serve()
        self.pipe.recv()  # the last rank waits: whatever it gets from now on is ours
        call()
        end, rows = time.monotonic(), self.exchange.retried_rows
        while not self.pipe.poll():
            self.bell.wait(self.exchange.pending, 0.002)
            self.exchange.serve()
        return end, rows


def _main(pipe: Connection, rank: int, ranks: int, shared: tuple[Any, Any, Any]) -> None:
    process = Rank(pipe, rank, ranks, shared)
    while True:
        name, arguments = pipe.recv()
        if name == "stop":
            return
        pipe.send(getattr(process, name)(*arguments))


class Group:
    """All rank processes, driven by this one."""

    def __init__(self, context: Any, ranks: int) -> None:
        self.died_at = context.Value("d", 0.0)
        shared = (context.Barrier(ranks), context.Value("i", 0), self.died_at)
        self.mask = LiveMask.create()
        self.pipes, self.processes, self.bells = [], [], []
        for rank in range(ranks):
            pipe, child = context.Pipe()
            process = context.Process(target=_main, args=(child, rank, ranks, shared), daemon=True)
            process.start()
            child.close()
            self.pipes.append(pipe)
            self.processes.append(process)
        handles = [pipe.recv() for pipe in self.pipes]
        for pipe in self.pipes:
            fd = recv_handle(pipe)
            self.bells.append(Bell.attach(fd))
            os.close(fd)
            pipe.send(({RankId(r, r + 1): handle for r, handle in enumerate(handles)}, self.mask.handle()))

    def all(self, pipes: list[Connection], *command: Any) -> None:
        for pipe in pipes:
            pipe.send(command)

    def race(self, rounds: int) -> Times:
        with tempfile.TemporaryDirectory() as folder:
            self.all(self.pipes, "race", (f"{folder}/store", rounds))
            found: Times = {}
            for times in [pipe.recv() for pipe in self.pipes]:
                for name, seconds in times.items():
                    found.setdefault(name, []).extend(seconds)
        self.all(self.pipes, "stop", ())
        return found

    def loss(self, fatal: int) -> tuple[float, int]:
        """Seconds from the loss (SIGKILL, or the mask after SIGSTOP) to the last survivor's result; rows sent again."""
        self.all(self.pipes, "loss", (fatal,))
        survivors = self.pipes[:-1]
        time.sleep(0.3)
        self.all(survivors, "go")
        start = 0.0
        if fatal == signal.SIGSTOP:
            time.sleep(0.3)  # the others wait for it by now
            start = time.monotonic()
            self.mask.mask(len(survivors))
            for bell in self.bells:
                bell.ring()
        time.sleep(0.3)
        self.all(survivors, "stop", ())
        ends = [pipe.recv() for pipe in survivors]
        return max(end for end, _ in ends) - (start or self.died_at.value), sum(rows for _, rows in ends)

    def close(self) -> None:
        for process, pipe, bell in zip(self.processes, self.pipes, self.bells, strict=True):
            process.join(1.0)
            process.kill()
            process.join(TIMEOUT_S)
            pipe.close()
            bell.close()
        self.mask.close()


def report(times: Times, losses: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Microseconds, and how many times longer gloo takes."""
    found: dict[str, dict[str, float]] = {}
    for tokens, top_k in CASES:
        name = f"{tokens} x top-{top_k}"
        row: dict[str, float] = {}
        for kind in ("shm", "gloo"):
            p50, p99 = np.percentile(times[f"{kind} {name}"], (50, 99)) * 1e6
            row |= {f"{kind}_p50_us": round(p50, 1), f"{kind}_p99_us": round(p99, 1)}
        row["gloo_over_shm_p50"] = round(row["gloo_p50_us"] / row["shm_p50_us"], 1)
        found[name] = row
    for how, seconds in losses.items():
        found[how] = {"p50_us": round(statistics.median(seconds) * 1e6), "worst_us": round(max(seconds) * 1e6)}
    return found


def main() -> None:
    """Run, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["workers.exchange.loop", "workers.exchange.shm.transport", "torch.distributed"])
    with closing(Group(context, options.ranks)) as group:
        times = group.race(options.rounds)
    losses: dict[str, list[float]] = {}
    for how, fatal in (("retry after SIGKILL", signal.SIGKILL), ("retry after mask", signal.SIGSTOP)):
        for _ in range(TURNS):
            with closing(Group(context, options.ranks)) as group:
                seconds, rows = group.loss(fatal)
            if not rows:
                raise RuntimeError("the lost rank had no rows: nothing was measured")
            losses.setdefault(how, []).append(seconds)
    found = report(times, losses)
    if options.output == "json":
        print(json.dumps({"ranks": options.ranks, "hidden": HIDDEN, "dtype": "bfloat16", "results": found}))
        return
    for name, row in found.items():
        print(f"{name:20s}", "  ".join(f"{key} {value:g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
