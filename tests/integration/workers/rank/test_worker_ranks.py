"""Real workers linked by the real exchange: the same bits over 1, 2, 4 and 6 ranks, and across changes of the view.

Each rank is a thread here; tests elsewhere kill ranks that are processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from membership.placement.plan import plan
from membership.store.records import Member, View
from tests.support.families import VOCAB, write_checkpoint
from tests.support.model_helpers import prompts
from tests.support.rank_threads import Fleet
from workers.protocol.messages import Sampling, SeqChunk

pytestmark = pytest.mark.integration

NEW_TOKENS = 10
BLOCKS_PER_SEQ = 5


@pytest.fixture(scope="module", params=["mixtral-bfloat16", "deepseek_v3-float32"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, dtype = request.param.split("-")
    return write_checkpoint(tmp_path_factory.mktemp("m"), family, dtype)


@pytest.fixture
def fleet(checkpoint: Path) -> Iterator[Fleet]:
    made = Fleet(checkpoint, 6)
    try:
        yield made
    finally:
        made.close()


def generate(
    fleet: Fleet, work: list[list[int]], rng: random.Random, homes: Sequence[int]
) -> dict[tuple[int, int], object]:
    """Run all prompts at once, each on a random home; (sequence, position) -> (token, exact log probabilities)."""
    home = {seq: rng.choice(list(homes)) for seq in range(len(work))}
    tokens = {seq: list(prompt) for seq, prompt in enumerate(work)}
    done = dict.fromkeys(tokens, 0)
    blocks = {seq: list(range(seq * BLOCKS_PER_SEQ, (seq + 1) * BLOCKS_PER_SEQ)) for seq in tokens}
    found: dict[tuple[int, int], object] = {}
    while any(len(tokens[s]) < len(work[s]) + NEW_TOKENS for s in tokens):
        chunks: dict[int, list[SeqChunk]] = {}
        for seq, prompt in enumerate(work):
            if len(tokens[seq]) < len(prompt) + NEW_TOKENS and rng.random() < 0.8:
                piece = tokens[seq][done[seq] : done[seq] + rng.choice((2, 13, 64))]
                last = done[seq] + len(piece) == len(tokens[seq])
                sampling = Sampling(logprobs=2) if last else None
                chunks.setdefault(home[seq], []).append(SeqChunk(seq, done[seq], piece, blocks[seq], sampling))
                done[seq] += len(piece)
        for seq, token in (fleet.run(chunks) if chunks else {}).items():
            found[seq, len(tokens[seq])] = token
            tokens[seq].append(token[0])
    return found


def test_same_bits_over_any_number_of_ranks(fleet: Fleet) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    work = prompts(9, VOCAB, rng, longest=60)
    fleet.use([0])
    expected = generate(fleet, work, rng, [0])
    for ranks in ([0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [1, 4, 5], [3]):
        fleet.use(ranks)
        assert generate(fleet, work, rng, ranks) == expected, ranks


def test_a_peer_that_never_comes_holds_up_no_later_view(fleet: Fleet) -> None:
    """A rank that died while a view was being prepared never links; the repair must not wait for it."""
    worker = fleet.ranks[0].worker
    fleet.use([0])
    of_two = plan(2, 8, [0, 1], 2.0, None)
    members = (Member(rank=0, node="n", incarnation=1), Member(rank=1, node="n", incarnation=99))
    worker.prepare_epoch(View(epoch=2, members=members, placement=of_two), {1: (99, b"")})
    fleet.use([0])
    assert fleet.view.epoch == 2
    fleet.run({0: [SeqChunk(0, 0, [1, 2, 3], [0], Sampling())]})
