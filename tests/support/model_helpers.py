"""Running a model in one process the way the engine would: blocks, chunks, batches; with experts here or spread out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from membership.base.enums import Dtype, Exactness
from tests.support.local_exchange import LocalExchange
from workers.model.expert_bank import LocalExpertBank
from workers.model.load import load_model
from workers.model.runner import ModelRunner
from workers.protocol.messages import Sampling, SeqChunk

BLOCK = 16
GREEDY = Sampling()


class SpreadBank:
    """Experts of one model spread over several banks, as over ranks; asks the owner in small, shuffled portions."""

    def __init__(self, banks: Sequence[LocalExpertBank], rng: random.Random) -> None:
        self._banks = banks
        self._rng = rng

    def holds(self, layer: int, expert: int) -> bool:
        return any(bank.holds(layer, expert) for bank in self._banks)

    def padded(self, rows: int) -> int:
        return rows

    def compute_many(self, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Any) -> Any:
        import torch

        parts = torch.split(rows, list(sizes))
        return torch.cat([self._compute(layer, e, part) for e, part in zip(experts, parts, strict=True)])

    def _compute(self, layer: int, expert: int, rows: Any) -> Any:
        import torch

        owners = [bank for bank in self._banks if bank.holds(layer, expert)]
        cut = self._rng.randrange(len(rows) + 1)
        parts = [part for part in (rows[:cut], rows[cut:]) if len(part)]
        return torch.cat([self._rng.choice(owners).compute(layer, expert, part) for part in parts])


def make_runner(
    path: Path, dtype: str = Dtype.AUTO, *, exactness: Exactness = Exactness.INVARIANT, blocks: int = 96
) -> ModelRunner:
    """A runner with all experts here. Close it."""
    import torch

    torch.set_num_threads(1)
    loaded = load_model(path, dtype)
    bank = LocalExpertBank()
    runner = ModelRunner(loaded, bank, exactness, kv_blocks=blocks, block_size=BLOCK, max_len=512)
    bank.load_all([(layer, e) for layer in range(loaded.info.moe_layers) for e in range(loaded.info.experts)])
    runner.attach(LocalExchange(bank))
    return runner


class Sequences:
    """Hands out shuffled blocks and turns prompts into chunks, like a scheduler without a policy."""

    def __init__(self, runner: ModelRunner, rng: random.Random) -> None:
        self._runner = runner
        self._free = list(range(runner.cache.blocks))
        rng.shuffle(self._free)
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[tuple[int, int], object] = {}  # (sequence, position) -> exact log probabilities
        self._done: dict[int, int] = {}
        self._blocks: dict[int, list[int]] = {}
        self._sampling: dict[int, Sampling] = {}

    def add(self, seq: int, prompt: Sequence[int], sampling: Sampling = GREEDY) -> None:
        self.tokens[seq] = list(prompt)
        self._done[seq] = 0
        self._blocks[seq] = [self._free.pop() for _ in range(10)]
        self._sampling[seq] = sampling

    def drop(self, seq: int) -> list[int]:
        self._free.extend(self._blocks.pop(seq))
        del self._done[seq]
        return self.tokens.pop(seq)

    def chunk(self, seq: int, most: int) -> SeqChunk:
        start = self._done[seq]
        tokens = self.tokens[seq][start : start + most]
        last = start + len(tokens) == len(self.tokens[seq])
        return SeqChunk(seq, start, tokens, self._blocks[seq], self._sampling[seq] if last else None)

    def step(self, chunks: Sequence[SeqChunk]) -> None:
        for sampled in self._runner.run(chunks):
            self.logprobs[sampled.seq, len(self.tokens[sampled.seq])] = sampled.logprobs
            self.tokens[sampled.seq].append(sampled.token)
        for chunk in chunks:
            self.done(chunk)

    def done(self, chunk: SeqChunk) -> None:
        """The chunk has been run."""
        self._done[chunk.seq] = chunk.start + len(chunk.tokens)

    def finish(self, seq: int, total: int, most: int = 512) -> list[int]:
        """Run `seq` alone until it has `total` tokens."""
        while len(self.tokens[seq]) < total:
            self.step([self.chunk(seq, most)])
        return self.tokens[seq]


def prompts(count: int, vocab: int, rng: random.Random, longest: int = 120) -> list[list[int]]:
    """Random prompts of mixed lengths, one of them a single token."""
    lengths = [1, *(rng.randrange(2, longest) for _ in range(count - 1))]
    return [[rng.randrange(2, vocab) for _ in range(n)] for n in lengths]


def run_mixed(
    sequences: Sequences, work: dict[int, tuple[list[int], Sampling]], total: int, rng: random.Random
) -> None:
    """Run all of `work` to `total` tokens beyond the prompt: random joins, random chunks, random batch mates."""
    goals = {seq: len(prompt) + total for seq, (prompt, _) in work.items()}
    waiting = list(work)
    rng.shuffle(waiting)
    while True:
        if waiting and rng.random() < 0.6:
            seq = waiting.pop()
            sequences.add(seq, *work[seq])
        active = [s for s in sequences.tokens if len(sequences.tokens[s]) < goals[s]]
        if not active and not waiting:
            return
        picked = rng.sample(active, rng.randint(min(1, len(active)), len(active)))
        if picked:
            sequences.step([sequences.chunk(s, rng.choice((1, 3, 17, 64, 512))) for s in picked])
