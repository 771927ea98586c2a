"""The prefix cache, also over new engines, and the pools of dead ranks, with a real model: the same tokens and
log-probabilities, to the bit, as without them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from elastic.engine.scheduler import Scheduler
from elastic.protocol import Submit, Tokens
from membership.base.rank_id import RankId
from membership.store.records import ClusterConfig, Member, View
from tests.support.families import VOCAB, write_checkpoint
from tests.support.model_helpers import BLOCK, make_runner
from workers.model.runner import ModelRunner
from workers.protocol.messages import BlocksCopied, Known, Sampling, StepResult, StepStatus

pytestmark = pytest.mark.integration

BLOCKS = 40  # per rank: too few for all that is asked, so that some is evicted
NEW_TOKENS = 6
Seen = dict[str, list[object]]
"""request -> each token with its log-probabilities"""


@pytest.fixture(scope="module", params=["mixtral-bfloat16", "deepseek_v3-float32"])
def runners(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ModelRunner]]:
    """Two ranks' models, each with all experts."""
    family, dtype = request.param.split("-")
    changes = {"sliding_window": 24} if family == "mixtral" else {}
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("m"), family, dtype, **changes)
    made = [make_runner(checkpoint, blocks=BLOCKS) for _ in range(2)]
    yield made
    for runner in made:
        runner.close()


class Ranks:
    """A scheduler over two ranks. A rank that comes back has another incarnation, and nonsense in its cache."""

    def __init__(self, runners: list[ModelRunner], *, cached: bool, pools: bool = False) -> None:
        self.runners = runners
        self.pools: dict[RankId, int] | None = {} if pools else None  # of the dead
        self.config = ClusterConfig(
            cluster="c", model="m", served_model_name="m", moe_layers=1, experts=1, max_model_len=256,
            block_size=BLOCK, kv_blocks=BLOCKS, max_batched_tokens=48, prefix_cache=cached,
        )  # fmt: skip
        self.token = 1  # of the engine
        self.scheduler = Scheduler(self.config, self.token)
        self.members = {0: 1, 1: 2}
        self.known: dict[int, Known] = {0: {}, 1: {}}  # what ranks were told of their blocks
        self.epoch = 0
        self.requests: dict[str, Submit] = {}
        self.seen: Seen = {}
        self.cached = 0  # tokens, by engines before
        self.commit()

    def take_over(self) -> None:
        """Another engine. It gets what has not ended, and from ranks what they were told."""
        self.cached += self.scheduler.cached_tokens
        self.token += 1
        self.scheduler = Scheduler(self.config, self.token)
        for rank, incarnation in self.members.items():
            known = {block: name for block, name in self.known[rank].items() if name}
            self.scheduler.holds(RankId(rank, incarnation), known)
        self.commit()
        for name, request in self.requests.items():
            if len(seen := self.seen[name]) < NEW_TOKENS:
                emitted = [token for token, _ in seen]
                assert self.scheduler.submit(replace(request, emitted=emitted), 0.0) == []

    def commit(self) -> None:
        self.epoch += 1
        members = tuple(Member(rank=rank, node="n", incarnation=inc) for rank, inc in self.members.items())
        view = View(epoch=self.epoch, members=members, placement={rank: ((0,),) for rank in self.members})
        self.scheduler.set_view(view, [], 0.0)

    def submit(self, name: str, prompt: list[int]) -> None:
        sampled = Sampling(temperature=0.8, seed=3, logprobs=2) if len(prompt) % 2 else Sampling(logprobs=2)
        self.requests[name] = request = Submit(name, prompt, sampled, NEW_TOKENS, ignore_eos=True)
        assert self.scheduler.submit(request, 0.0) == []
        self.seen[name] = []

    def read(self) -> None:
        """Have ranks read from the pools what they are asked to."""
        orders = self.scheduler.copies(0.0)
        while orders:
            order = orders.pop()
            assert self.pools is not None
            count = self.runners[order.target.rank].read_in(order.blocks, self.pools[order.source], order.there)
            orders += self.scheduler.copied(BlocksCopied(*order.target, 1, order.copy, count), 0.0)

    def fullest(self) -> int:
        """The rank that has computed most of what its requests are."""
        homes = self.scheduler._homes.values()
        return max(homes, key=lambda home: sum(sequence.computed for sequence in home.running)).rank

    def close(self) -> None:
        for pool in (self.pools or {}).values():
            os.close(pool)

    def step(self) -> bool:
        self.read()
        batch = self.scheduler.schedule(0.0)
        for rank, known in batch.known.items() if batch is not None else ():
            self.known[rank] |= known
        for rank, chunks in batch.ranks.items() if batch is not None else ():
            tokens = self.runners[rank].run(chunks)
            answer = (rank, self.members[rank], self.token, batch.epoch, batch.step, batch.attempt) if batch else ()
            for output in self.scheduler.apply(StepResult(*answer, StepStatus.OK, tokens), 0.0):
                assert isinstance(output, Tokens)
                self.seen[output.request_id] += zip(output.tokens, output.logprobs or [], strict=True)
        return batch is not None

    def kill(self, rank: int) -> None:
        import torch

        memory: torch.Tensor = self.runners[rank].cache.memory  # type: ignore[attr-defined]
        if self.pools is not None:
            self.pools[RankId(rank, self.members[rank])] = pool = os.memfd_create("kv")
            os.write(pool, memory.numpy().data)
        self.scheduler.lose_ranks([rank], 0.0, ended=self.pools is not None)
        with torch.inference_mode():
            memory.fill_(7.0)
        self.members[rank] += 10


def prompts() -> dict[str, list[int]]:
    """Beginnings in common of every length around the edges of blocks, some of them with a whole prompt."""
    chance = random.Random(5)
    common = [chance.randrange(VOCAB) for _ in range(4 * BLOCK)]
    lengths = [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 4 * BLOCK]
    made = {}
    for length in chance.sample(lengths * 2, 2 * len(lengths)):
        own = [chance.randrange(VOCAB) for _ in range(chance.choice((0, 1, 9, 40)))]
        made[f"r{len(made)}"] = [*common[:length], *own]
    return made


@pytest.mark.parametrize(
    "how", ["cached", "cached, engines", "cached, deaths", "cached, deaths, pools", "deaths, pools"]
)
def test_the_same_bits_with_and_without_over_deaths_and_evictions(runners: list[ModelRunner], how: str) -> None:
    cached, kills, pools, engines = ("cached" in how, "deaths" in how, "pools" in how, "engines" in how)
    found = {}
    for with_them in (False, True):
        ranks = Ranks(runners, cached=cached and with_them, pools=pools and with_them)
        for number, (name, prompt) in enumerate(prompts().items()):
            ranks.submit(name, prompt)
            for _ in range(3):
                ranks.step()
            if engines and with_them and number % 2:
                ranks.take_over()
            if kills and with_them and number % 3 == 2:
                ranks.kill(ranks.fullest())
                ranks.step()
                ranks.commit()
        while ranks.step():
            pass
        ranks.close()
        found[with_them] = ranks.seen
        assert (ranks.cached + ranks.scheduler.cached_tokens > 8 * BLOCK) == (cached and with_them)
        ranks.scheduler.salvaged()
        assert (ranks.scheduler.salvaged_tokens > 2 * BLOCK) == (pools and with_them)
    assert all(len(tokens) == NEW_TOKENS for tokens in found[False].values())
    assert found[True] == found[False]
