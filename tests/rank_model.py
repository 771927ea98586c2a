"""A model of all ranks and of a gateway for scheduler tests: it checks every KV cell and every token index."""

from __future__ import annotations

import hashlib

from elastic.protocol import Rejected, Submit
from elastic.scheduler import Output, Scheduler
from membership.types import ClusterConfig, Member, View
from workers.messages import (
    BlocksCopied,
    CopyBlocks,
    SampledToken,
    Sampling,
    SeqChunk,
    StepBatch,
    StepResult,
    StepStatus,
)

TOKEN, EOS = 77, 3


def next_token(tokens: list[int], vocab: int = 50) -> int:
    """The pretended model: depends on every token before."""
    return hashlib.blake2b(repr(tokens).encode()).digest()[0] % vocab


def oracle(request: Submit) -> tuple[list[int], str]:
    """What the request must yield, whatever happens on the way."""
    output: list[int] = []
    while len(output) < request.max_tokens:
        token = next_token([*request.prompt, *output])
        if (token == EOS and not request.ignore_eos) or token in request.stop_token_ids:
            return output, "stop"
        output.append(token)
    return output, "length"


def config(**changes: object) -> ClusterConfig:
    base: dict[str, object] = {"block_size": 4, "kv_blocks": 12, "max_batched_tokens": 9, "max_seqs": 4}
    base |= {"max_model_len": 48, "eos_token_ids": (EOS,), "vocab_size": 50, "coverage_deadline_s": 30.0}
    return ClusterConfig(
        cluster="c",
        model="m",
        served_model_name="m",
        moe_layers=2,
        experts=2,
        **(base | changes),  # type: ignore[arg-type]
    )


def view(epoch: int, members: dict[int, int], *, covered: bool = True) -> View:
    """A view of rank -> incarnation; every member holds all experts, or the first holds only one."""
    layers = ((0, 1), (0, 1)) if covered else ((0,), (0,))
    placed = tuple(Member(rank=r, node="n", incarnation=i) for r, i in members.items())
    return View(epoch=epoch, members=placed, placement=dict.fromkeys(members, layers))


Cell = tuple[int, int]
"""(position, token)"""


class Ranks:
    """All ranks' KV caches: writes each chunk's cells, and reads back the whole sequence before it samples."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cells: dict[tuple[int, int, int, int], Cell] = {}
        self.on_the_way: dict[tuple[tuple[int, int], tuple[int, int]], tuple[int, list[list[Cell | None]]]] = {}

    def run(self, batch: StepBatch, incarnations: dict[int, int]) -> list[StepResult]:
        taken: set[tuple[int, int]] = set()
        for rank, chunks in batch.ranks.items():
            for chunk in chunks:
                mine = {(rank, block) for block in chunk.blocks}
                assert not taken & mine, "two sequences share a block"
                taken |= mine
        return [self.answer(batch, rank, incarnations[rank]) for rank in batch.ranks]

    def answer(self, batch: StepBatch, rank: int, incarnation: int) -> StepResult:
        sampled = []
        for chunk in batch.ranks[rank]:
            for offset, token in enumerate(chunk.tokens):
                self.cells[self.cell(rank, incarnation, chunk, chunk.start + offset)] = (chunk.start + offset, token)
            if chunk.sample is not None:
                sampled.append(SampledToken(chunk.seq, next_token(self.read(rank, incarnation, chunk))))
        return reply(batch, rank, incarnation, sampled)

    def read(self, rank: int, incarnation: int, chunk: SeqChunk) -> list[int]:
        stored = [self.cells[self.cell(rank, incarnation, chunk, p)] for p in range(chunk.start + len(chunk.tokens))]
        assert [position for position, _ in stored] == list(range(len(stored))), "another sequence's cells"
        return [token for _, token in stored]

    def copy(self, order: CopyBlocks, piece: int = 100, error: str = "") -> BlocksCopied:
        """Half of a move: at most `piece` blocks into or out of the one place for what is on its way."""
        count = 0 if error else min(len(order.blocks), piece)
        key = order.source, order.target
        if order.arriving and count:
            number, blocks = self.on_the_way[key]
            count = len(blocks) if number == order.copy else 0
            for block, cells in zip(order.blocks, blocks, strict=True) if count else ():
                for offset, cell in enumerate(cells):
                    if cell is not None:
                        self.cells[*order.target, block, offset] = cell
        elif count:
            self.on_the_way[key] = (
                order.copy,
                [
                    [self.cells.get((*order.source, block, offset)) for offset in range(self.block_size)]
                    for block in order.blocks[:count]
                ],
            )
        return BlocksCopied(*order.addressee, order.engine_token, order.copy, count, error)

    def cell(self, rank: int, incarnation: int, chunk: SeqChunk, position: int) -> tuple[int, int, int, int]:
        block, offset = divmod(position, self.block_size)
        return rank, incarnation, chunk.blocks[block], offset


def reply(
    batch: StepBatch,
    rank: int,
    incarnation: int,
    tokens: list[SampledToken] | None = None,
    status: StepStatus = StepStatus.OK,
    error: str = "",
    suspects: list[int] | None = None,
) -> StepResult:
    return StepResult(
        rank, incarnation, batch.engine_token, batch.epoch, batch.step, batch.attempt, status, tokens or [], error,
        suspects or [],
    )  # fmt: skip


class Client:
    """What gateways have got: checks that indices have no gap and no duplicate, and that each request ends once."""

    def __init__(self) -> None:
        self.requests: dict[str, Submit] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}

    def submit(self, scheduler: Scheduler, request: Submit, now: float) -> None:
        self.requests[request.request_id] = request
        self.outputs.setdefault(request.request_id, [])
        self.take(scheduler.submit(request, now))

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.request_id not in self.ends, "an output after the end"
            if isinstance(output, Rejected):
                self.ends[output.request_id] = f"{output.status} {output.message}"
                continue
            assert output.index == len(self.outputs[output.request_id]), "a gap or a duplicate"
            self.outputs[output.request_id] += output.tokens
            if output.finish_reason:
                self.ends[output.request_id] = output.finish_reason

    def check(self) -> None:
        for name, request in self.requests.items():
            assert (self.outputs[name], self.ends.get(name)) == oracle(request), name


def ask(name: str, prompt: list[int], max_tokens: int = 5, **more: object) -> Submit:
    return Submit(name, prompt, Sampling(), max_tokens, **more)  # type: ignore[arg-type]


def drive(scheduler: Scheduler, ranks: Ranks, client: Client, members: dict[int, int], now: float = 0.0) -> int:
    """Run steps until nothing is left; returns how many."""
    steps = 0
    while (batch := scheduler.schedule(now)) is not None:
        for result in ranks.run(batch, members):
            client.take(scheduler.apply(result, now))
        steps += 1
        assert steps < 5000, "the requests do not finish"
        now += 1.0
    return steps


def pool_is_whole(scheduler: Scheduler) -> None:
    for home in scheduler._homes.values():
        held = [block for sequence in home.running for block in sequence.blocks]
        held += scheduler._migration.reserved(home)
        assert len(set(held)) == len(held) == home.pool.used
        assert sorted(held + home.pool._free) == list(range(home.pool.size))
