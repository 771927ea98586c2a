"""KV blocks copied between real ranks: the same bits as without a move, for caches of grouped heads and latent ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from membership.base.errors import ElasticError
from membership.base.network import Network
from membership.base.rank_id import RankId
from tests.support.families import VOCAB, write_checkpoint
from tests.support.model_helpers import prompts
from tests.support.rank_threads import Fleet
from workers.exchange.shm import wire
from workers.exchange.tcp.link import TcpLink
from workers.protocol.messages import CopyBlocks, Sampling, SeqChunk

pytestmark = pytest.mark.integration

PER_SEQUENCE = 6
NEW_TOKENS = 12


@pytest.fixture(scope="module", params=["mixtral-bfloat16", "deepseek_v3-float32"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, dtype = request.param.split("-")
    return write_checkpoint(tmp_path_factory.mktemp("m"), family, dtype)


@pytest.fixture
def fleet(checkpoint: Path) -> Iterator[Fleet]:
    made = Fleet(checkpoint, 3)
    try:
        made.use([0, 1, 2])
        yield made
    finally:
        made.close()


@pytest.fixture
def far_fleet(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Each rank takes the others to be on other hosts."""
    numbers = count()
    monkeypatch.setattr("workers.exchange.auto.this_host", lambda: f"host {next(numbers)}")
    made = Fleet(checkpoint, 3, Network("127.0.0.1", "moe", b"a secret of the tests' cluster"))
    try:
        made.use([0, 1, 2])
        yield made
    finally:
        made.close()


class Streams:
    """Sequences that decode; each may move to another rank at any time."""

    def __init__(self, fleet: Fleet, work: list[list[int]], chance: random.Random) -> None:
        self.fleet, self.chance = fleet, chance
        self.tokens = {seq: list(prompt) for seq, prompt in enumerate(work)}
        self.done = dict.fromkeys(self.tokens, 0)
        self.home = {seq: chance.randrange(3) for seq in self.tokens}
        self.free = {rank: chance.sample(range(fleet.config.kv_blocks), fleet.config.kv_blocks) for rank in range(3)}
        self.blocks = {seq: self.take(self.home[seq]) for seq in self.tokens}
        self.found: dict[tuple[int, int], object] = {}
        self.copies = 0

    def take(self, rank: int) -> list[int]:
        return [self.free[rank].pop() for _ in range(PER_SEQUENCE)]

    def step(self, most: int = 512) -> None:
        chunks: dict[int, list[SeqChunk]] = {}
        for seq, tokens in self.tokens.items():
            start = self.done[seq]
            piece = tokens[start : start + most]
            sampling = Sampling(logprobs=2) if start + len(piece) == len(tokens) else None
            chunks.setdefault(self.home[seq], []).append(SeqChunk(seq, start, piece, self.blocks[seq], sampling))
            self.done[seq] += len(piece)
        for seq, token in self.fleet.run(chunks).items():
            self.found[seq, len(self.tokens[seq])] = token
            self.tokens[seq].append(token[0])

    def move(self, seq: int, target: int, piece: int = PER_SEQUENCE) -> None:
        """As the engine does it: written out, taken in, then the home changes and the old blocks are free."""
        source, blocks, mine = self.home[seq], self.take(target), self.blocks[seq]
        used = -(-self.done[seq] // self.fleet.config.block_size)
        for first in range(0, used, piece):
            last = min(used, first + piece)
            self.copies += 1
            ends = (source, source + 1), (target, target + 1)
            assert self.fleet.copy(CopyBlocks(1, self.copies, *ends, mine[first:last])) == last - first
            assert self.fleet.copy(CopyBlocks(1, self.copies, *ends, blocks[first:last], True)) == last - first
        self.free[source] += mine
        self.home[seq], self.blocks[seq] = target, blocks


def run(fleet: Fleet, work: list[list[int]], chance: random.Random, moves: float) -> dict[tuple[int, int], object]:
    streams = Streams(fleet, work, chance)
    for _ in range(NEW_TOKENS):
        streams.step()
        for seq in streams.tokens:
            if chance.random() < moves:
                streams.move(seq, chance.choice([r for r in range(3) if r != streams.home[seq]]), chance.choice((1, 3)))
    return streams.found


def test_moved_sequences_yield_the_same_bits(fleet: Fleet) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    work = prompts(9, VOCAB, chance, longest=70)
    expected = run(fleet, work, chance, 0.0)
    assert run(fleet, work, chance, 0.4) == expected


def test_over_a_network_too(far_fleet: Fleet) -> None:
    chance = random.Random(8)
    work = prompts(6, VOCAB, chance, longest=70)
    expected = run(far_fleet, work, chance, 0.0)
    assert run(far_fleet, work, chance, 0.4) == expected
    assert all(type(link) is TcpLink for rank in far_fleet.ranks for link in rank.worker.exchange._links.live)
    ends = RankId(0, 1), RankId(1, 2)
    assert far_fleet.copy(CopyBlocks(1, 1007, *ends, [3, 4])) == 2
    with pytest.raises(ElasticError, match="instead of"):
        far_fleet.copy(CopyBlocks(1, 1008, *ends, [3, 4], True))
    with pytest.raises(ElasticError, match="nothing has come from rank 0"):
        far_fleet.copy(CopyBlocks(1, 1007, *ends, [3, 4], True))


def test_a_sequence_moves_in_the_middle_of_its_prompt(fleet: Fleet) -> None:
    chance = random.Random(5)
    work = [[chance.randrange(2, VOCAB) for _ in range(60)]]
    expected = run(fleet, work, chance, 0.0)
    streams = Streams(fleet, work, chance)
    streams.step(most=21)
    streams.move(0, (streams.home[0] + 1) % 3)
    for _ in range(NEW_TOKENS):
        streams.step()
    assert streams.found == expected


def test_what_a_rank_remembers_of_its_last_step_does_not_outlive_the_blocks(fleet: Fleet) -> None:
    """A sequence decodes, ends, and the one that moves in has its blocks and stands where it would."""
    chance = random.Random(6)
    work = [[chance.randrange(2, VOCAB) for _ in range(17)] for _ in range(2)]
    expected = run(fleet, work, chance, 0.0)
    streams = Streams(fleet, work, chance)
    streams.home, streams.blocks = {0: 0, 1: 1}, {0: streams.blocks[0], 1: streams.blocks[1]}
    for _ in range(3):
        streams.step()
    ended = streams.blocks[0]
    for kept in (streams.tokens, streams.done, streams.home):
        del kept[0]
    streams.free[0] += reversed(ended)
    streams.move(1, 0)
    assert streams.blocks[1] == ended
    for _ in range(4):
        streams.step()
    assert {key: token for key, token in expected.items() if key in streams.found} == streams.found


def test_only_as_much_as_fits_is_copied_at_once(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = fleet.ranks[0].worker._runner
    assert runner is not None
    monkeypatch.setattr(wire, "BULK", 64 + 2 * runner.cache.block_bytes + 7)
    order = CopyBlocks(1, 1, RankId(0, 1), RankId(1, 2), [5, 6, 7])
    assert fleet.copy(order) == 2
    monkeypatch.setattr(wire, "BULK", runner.cache.block_bytes)
    with pytest.raises(ElasticError, match="does not fit"):
        fleet.copy(order)


def test_what_was_not_announced_is_not_taken(fleet: Fleet) -> None:
    assert fleet.copy(CopyBlocks(1, 7, RankId(0, 1), RankId(1, 2), [3, 4])) == 2
    for token, copy, blocks in ((1, 8, [3, 4]), (2, 7, [3, 4]), (1, 7, [3])):
        with pytest.raises(ElasticError, match="instead of"):
            fleet.copy(CopyBlocks(token, copy, RankId(0, 1), RankId(1, 2), blocks, True))
    with pytest.raises(ElasticError, match="no link with rank 1"):
        fleet.copy(CopyBlocks(1, 9, RankId(0, 1), RankId(1, 99), [3]))
    with pytest.raises(ElasticError, match="not all within"):
        fleet.copy(CopyBlocks(1, 9, RankId(0, 1), RankId(1, 2), [64]))
    assert fleet.copy(CopyBlocks(1, 7, RankId(0, 1), RankId(1, 2), [9, 8], True)) == 2
