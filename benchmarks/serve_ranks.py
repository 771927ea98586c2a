"""Rank processes for benchmarks: real workers over the real exchange, which share the streams and the experts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

from membership.placement.plan import plan
from membership.store.records import ClusterConfig, Member, View
from workers.ipc.doorbell import Bell, Doorbell
from workers.protocol.messages import CopyBlocks, Sampling, SeqChunk, StepBatch, StepResult, StepStatus

DEADLINE_S = 120.0


def rank_main(pipe: Connection, rank: int, config: ClusterConfig) -> None:
    """One rank: load, link, then a step per message."""
    from workers.rank.worker import EPWorker
    from workers.rank.worker_api import WorkerContext

    doorbell = Doorbell()
    worker = EPWorker(WorkerContext(rank, rank + 1, "n", config, doorbell, {}, contextlib.nullcontext()))
    worker.init_device()
    worker.load_model()
    send_handle(pipe, doorbell.fileno(), os.getppid())
    pipe.send(worker.exchange_handle())
    while True:
        doorbell.wait(lambda: worker.pending() or pipe.poll(), 1.0)
        worker.poll()
        if not pipe.poll():
            continue
        try:
            message = pipe.recv()
        except EOFError:
            break
        if isinstance(message, StepBatch):
            result = worker.execute_model(message)
            if result is not None:
                pipe.send(result)
        elif isinstance(message, CopyBlocks):
            pipe.send(worker.copy_blocks(message))
        else:
            preparation = worker.prepare_epoch(*message)
            while preparation.running:
                doorbell.wait(worker.pending, 0.01)
                worker.poll()
            pipe.send(preparation.get_output(0))
    worker.shutdown()
    doorbell.close()


class Ranks:
    """Some rank processes with one committed view."""

    def __init__(self, config: ClusterConfig, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes, self.bells = [], [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=rank_main, args=(theirs, rank, config), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        handles = []
        for pipe in self.pipes:
            fd = recv_handle(pipe)
            self.bells.append(Bell.attach(fd))
            os.close(fd)
            handles.append(self._receive(pipe))
        placement = plan(config.moe_layers, config.experts, list(range(count)), config.redundancy)
        members = tuple(Member(rank=r, node="n", incarnation=r + 1) for r in range(count))
        peers = {r: (r + 1, handle) for r, handle in enumerate(handles)}
        self._send((View(epoch=1, members=members, placement=placement), peers))
        for pipe in self.pipes:
            self._receive(pipe)
        self._step = self._copies = 0

    def _send(self, message: object) -> None:
        for pipe, bell in zip(self.pipes, self.bells, strict=True):
            pipe.send(message)
            bell.ring()

    @staticmethod
    def _receive(pipe: Connection) -> Any:
        if not pipe.poll(DEADLINE_S):
            raise TimeoutError("a rank said nothing")
        return pipe.recv()

    def run(self, chunks: dict[int, list[SeqChunk]]) -> dict[int, int]:
        """One step: sequence -> token."""
        self._step += 1
        self._send(StepBatch(1, 1, self._step, 0, [], chunks))
        results: list[StepResult] = [self._receive(self.pipes[rank]) for rank in chunks]
        for result in results:
            if result.status is not StepStatus.OK:
                raise RuntimeError(result.error)
        return {sampled.seq: sampled.token for result in results for sampled in result.tokens}

    def copy(self, source: int, target: int, blocks: list[int], to: list[int]) -> None:
        """Copy KV blocks as the engine has it done: piece by piece, one half after the other."""
        ends, done = ((source, source + 1), (target, target + 1)), 0
        while done < len(blocks):
            self._copies += 1
            left = blocks[done:]
            count = self._ask(source, CopyBlocks(1, self._copies, *ends, left))
            self._ask(target, CopyBlocks(1, self._copies, *ends, to[done : done + count], arriving=True))
            done += count

    def _ask(self, rank: int, message: object) -> Any:
        self.pipes[rank].send(message)
        self.bells[rank].ring()
        return self._receive(self.pipes[rank])

    def close(self) -> None:
        """Have all ranks end."""
        for pipe, bell in zip(self.pipes, self.bells, strict=True):
            pipe.close()
            bell.ring()
            bell.close()
        for process in self.processes:
            process.join(10)


def decode_step(
    ranks: Ranks, streams: int, context: int, per_seq: int, prompt: Callable[[int, int], int]
) -> Callable[[], object]:
    """Prefill `streams` sequences, spread over the ranks; then a decode step per call."""
    count = len(ranks.pipes)
    blocks = [list(range(s // count * per_seq, (s // count + 1) * per_seq)) for s in range(streams)]
    last = {}
    for s in range(streams):
        tokens = [prompt(s, i) for i in range(context)]
        last |= ranks.run({s % count: [SeqChunk(s, 0, tokens, blocks[s], Sampling())]})
    position = context

    def step() -> object:
        nonlocal position, last
        chunks: dict[int, list[SeqChunk]] = {}
        for s in range(streams):
            chunks.setdefault(s % count, []).append(SeqChunk(s, position, [last[s]], blocks[s], Sampling()))
        last = ranks.run(chunks)
        position += 1
        return last

    return step
