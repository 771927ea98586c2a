"""A model of all ranks' KV caches, and the oracle. Chunks are written, and all of a sequence is read before sampling.

The simulation's ranks compute with it, so it is part of this shipped package; scheduler tests import it from here.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from chaos.simulation.invariants import require
from elastic.protocol import Submit
from workers.protocol.messages import (
    NO_TOKEN,
    BlocksCopied,
    CopyBlocks,
    SampledToken,
    SeqChunk,
    StepBatch,
    StepResult,
    StepStatus,
    TokenLogprobs,
)

EOS = 3

Cell = tuple[int, int]
"""(position, token)"""


def next_token(tokens: list[int], vocab: int = 50) -> int:
    """The pretended model: depends on every token before."""
    return hashlib.blake2b(repr(tokens).encode()).digest()[0] % vocab


def oracle(request: Submit) -> tuple[list[int], str]:
    """What the request must yield in every case: (tokens, finish reason)."""
    output: list[int] = []
    while len(output) < request.max_tokens:
        token = next_token([*request.prompt, *output])
        if (token == EOS and not request.ignore_eos) or token in request.stop_token_ids:
            return output, "stop"
        output.append(token)
    return output, "length"


class KvModel:
    """All ranks' KV caches, by (rank, incarnation, block, offset)."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cells: dict[tuple[int, int, int, int], Cell] = {}
        self.in_transit: dict[tuple[tuple[int, int], tuple[int, int]], tuple[int, list[list[Cell | None]]]] = {}

    def run(self, batch: StepBatch, incarnations: dict[int, int]) -> list[StepResult]:
        return [self.answer(batch, rank, incarnations[rank]) for rank in batch.ranks]

    def answer(self, batch: StepBatch, rank: int, incarnation: int) -> StepResult:
        sampled, users = [], Counter(block for chunk in batch.ranks[rank] for block in chunk.blocks)
        for chunk in batch.ranks[rank]:
            end = chunk.start + len(chunk.tokens)
            written = chunk.blocks[chunk.start // self.block_size : -(-end // self.block_size)]
            require(all(users[block] == 1 for block in written), "a sequence writes to a block of another one")
            self.write(rank, incarnation, chunk)
            token = NO_TOKEN if chunk.sample is None else next_token(self._read(rank, incarnation, chunk))
            targets = chunk.score.targets if chunk.score is not None else []
            scores = [TokenLogprobs(-float(chunk.start + row), [(target, 0.0)]) for row, target in enumerate(targets)]
            if chunk.sample is not None or chunk.score is not None:
                sampled.append(SampledToken(chunk.seq, token, scores=scores))
        return reply(batch, rank, incarnation, sampled)

    def write(self, rank: int, incarnation: int, chunk: SeqChunk, wrong: int = 0) -> None:
        """What a chunk computes; `wrong`: of tokens that are that far off."""
        for offset, token in enumerate(chunk.tokens):
            position = chunk.start + offset
            self.cells[self._cell(rank, incarnation, chunk, position)] = (position, token + wrong)

    def _read(self, rank: int, incarnation: int, chunk: SeqChunk) -> list[int]:
        wanted = range(chunk.start + len(chunk.tokens))
        stored = [self.cells.get(self._cell(rank, incarnation, chunk, p), (-1, -1)) for p in wanted]
        require([position for position, _ in stored] == list(wanted), "another sequence's cells, or none")
        return [token for _, token in stored]

    def copy(self, order: CopyBlocks, piece: int = 100, error: str = "") -> BlocksCopied:
        """Half of a move: at most `piece` blocks into or out of the buffer of one pair of ranks; or out of a pool."""
        count = 0 if error else min(len(order.blocks), piece)
        key = order.source, order.target
        if order.there:
            for block, source in zip(order.blocks[:count], order.there[:count], strict=True):
                for offset in range(self.block_size):
                    self.cells[*order.target, block, offset] = self.cells.get((*order.source, source, offset), (-1, -1))
        elif order.arriving and count:
            number, blocks = self.in_transit[key]
            count = len(blocks) if number == order.copy else 0
            for block, cells in zip(order.blocks, blocks, strict=True) if count else ():
                for offset, cell in enumerate(cells):
                    if cell is not None:
                        self.cells[*order.target, block, offset] = cell
        elif count:
            self.in_transit[key] = (
                order.copy,
                [
                    [self.cells.get((*order.source, block, offset)) for offset in range(self.block_size)]
                    for block in order.blocks[:count]
                ],
            )
        return BlocksCopied(*order.addressee, order.engine_token, order.copy, count, error)

    def _cell(self, rank: int, incarnation: int, chunk: SeqChunk, position: int) -> tuple[int, int, int, int]:
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
    """An answer to this batch."""
    return StepResult(
        rank, incarnation, batch.engine_token, batch.epoch, batch.step, batch.attempt, status, tokens or [], error,
        suspects or [],
    )  # fmt: skip
