"""The prefix cache: what is found, by whom, for how long, and that it changes no token."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from chaos.simulation.kv_model import KvModel
from elastic.engine.kv_blocks import BlockPool
from elastic.engine.prefix import Contents, crowding
from elastic.engine.scheduler import Scheduler
from elastic.protocol import Tokens
from membership.base.enums import Device, Dtype, Exactness
from membership.base.errors import ElasticError
from membership.base.rank_id import RankId
from tests.support.rank_model import TOKEN, Client, ask, config, drive, pool_is_whole, view
from workers.protocol.messages import StepBatch, StepStatus

pytestmark = pytest.mark.unit

ONE, TWO = {0: 10}, {0: 10, 1: 11}
PROMPT = list(range(4, 21))  # four blocks and a token


class Scene:
    """A scheduler over modelled ranks."""

    def __init__(self, members: dict[int, int] = ONE, **changes: object) -> None:
        self.members = members
        self.scheduler = Scheduler(config(**{"kv_blocks": 60, **changes}), TOKEN)
        self.scheduler.set_view(view(1, members), [], 0.0)
        self.ranks, self.client = KvModel(4), Client()
        self.cached: dict[str, int] = {}

    def submit(self, name: str, prompt: list[int], max_tokens: int = 3, **more: object) -> None:
        self.client.submit(self.scheduler, ask(name, prompt, max_tokens, ignore_eos=True, **more), 0.0)

    def step(self) -> StepBatch:
        batch = self.scheduler.schedule(0.0)
        assert batch is not None
        for result in self.ranks.run(batch, self.members):
            outputs = self.scheduler.apply(result, 0.0)
            self.cached |= {o.request_id: o.cached for o in outputs if isinstance(o, Tokens) and o.index == 0}
            self.client.take(outputs)
        pool_is_whole(self.scheduler)
        return batch

    def run(self, name: str, prompt: list[int], max_tokens: int = 3) -> int:
        """Run a request to its end; how many tokens of its prompt were not computed."""
        self.submit(name, prompt, max_tokens)
        while self.scheduler.knows(name):
            self.step()
        self.client.check()
        return self.cached[name]

    def homes(self) -> dict[str, int]:
        """request -> the rank that it runs on."""
        return {s.request.request_id: h.rank for h in self.scheduler._homes.values() for s in h.running}


@pytest.mark.parametrize("length", range(1, 18))
def test_a_prompt_begins_after_the_full_blocks_that_are_cached(length: int) -> None:
    """Shared beginnings of every length around the edges of blocks; the last token is always computed."""
    scene = Scene()
    assert scene.run("first", PROMPT[:length]) == 0
    assert scene.run("same", PROMPT[:length]) == (length - 1) // 4 * 4
    assert scene.run("longer", [*PROMPT[:length], 40]) == length // 4 * 4
    assert scene.run("other", [*PROMPT[: length - 1], 41, 42]) == (length - 1) // 4 * 4
    assert scene.run("unlike", [43, *PROMPT[:length]]) == 0


def test_an_answer_is_part_of_the_next_turn_s_history() -> None:
    scene = Scene()
    scene.run("first", PROMPT, 10)
    history = [*PROMPT, *scene.client.outputs["first"]]
    assert scene.run("second", [*history, 30, 31]) == 24, "26 tokens were computed: the last one never is"


def test_without_the_cache_everything_is_computed() -> None:
    scene = Scene(prefix_cache=False)
    scene.run("first", PROMPT)
    assert scene.run("same", PROMPT) == 0
    assert scene.scheduler.cached_tokens == 0
    assert scene.scheduler._homes[0].pool._content == {}


def test_tokens_are_counted() -> None:
    scene = Scene()
    scene.run("first", PROMPT)
    scene.run("same", PROMPT)
    assert (scene.scheduler.queried_tokens, scene.scheduler.cached_tokens) == (34, 16)


def test_blocks_of_another_model_type_or_mode_have_another_name() -> None:
    some = config()
    others = [
        Contents(some, "another"),
        Contents(replace(some, model="elsewhere"), "model"),
        Contents(replace(some, dtype=Dtype.BFLOAT16), "model"),
        Contents(replace(some, exactness=Exactness.STOCK), "model"),
        Contents(replace(some, device=Device.CUDA), "model"),
        Contents(replace(some, block_size=8), "model"),
    ]
    names = [tuple(each.extend([], PROMPT)) for each in (Contents(some, "model"), *others)]
    assert len({name for each in names for name in each}) == sum(map(len, names)) == 6 * 4 + 2
    assert Contents(some, "model").extend([], PROMPT) == list(names[0])


def test_the_same_tokens_after_others_have_another_name() -> None:
    contents = Contents(config(), "model")
    some, other = (contents.extend([], [*first, *PROMPT[:8]]) for first in ([1] * 4, [2] * 4))
    assert len({*some, *other}) == 6


def test_names_are_extended_as_tokens_come() -> None:
    contents = Contents(config(), "model")
    names: list[bytes] = []
    for length in range(len(PROMPT) + 1):
        assert contents.extend(names, PROMPT[:length]) is names
        assert len(names) == length // 4
    assert names == contents.extend([], PROMPT)


def test_a_block_is_not_found_before_a_rank_has_confirmed_all_of_it() -> None:
    scene = Scene(max_batched_tokens=6)
    scene.submit("first", PROMPT)
    scene.step()  # six tokens: one full block
    scene.submit("second", PROMPT)
    batch = scene.scheduler.schedule(0.0)
    assert batch is not None
    (second,) = [s for s in scene.scheduler._homes[0].running if s.request.request_id == "second"]
    assert (second.computed, second.cached) == (4, 4)
    refused = [replace(each, status=StepStatus.FAILED, tokens=[]) for each in scene.ranks.run(batch, ONE)]
    for result in refused:
        scene.scheduler.apply(result, 0.0)
    scene.submit("third", PROMPT)
    scene.scheduler.schedule(1.0)
    third = scene.scheduler._homes[0].running[-1]
    assert (third.request.request_id, third.computed) == ("third", 4), "a step that failed confirms nothing"


def test_a_request_that_is_aborted_leaves_what_was_confirmed() -> None:
    scene = Scene(max_batched_tokens=6)
    scene.submit("first", PROMPT)
    scene.step()
    assert scene.scheduler.schedule(0.0) is not None  # six more tokens are in flight
    scene.scheduler.abort("first")
    del scene.client.requests["first"]
    pool_is_whole(scene.scheduler)
    scene.scheduler._homes[0].in_flight.clear()
    assert scene.run("second", PROMPT) == 4


def test_requests_that_begin_alike_share_blocks_and_write_to_none_of_another() -> None:
    scene = Scene()
    scene.run("first", PROMPT)
    for n in range(3):
        scene.submit(f"r{n}", [*PROMPT[:16], 30 + n], 9)
    scene.step()
    assert scene.scheduler._homes[0].pool.used == 4 + 3, "the common blocks once, and one of each"
    drive(scene.scheduler, scene.ranks, scene.client, ONE)
    scene.client.check()
    pool_is_whole(scene.scheduler)


def test_what_nobody_uses_makes_room_the_least_recently_used_first() -> None:
    scene = Scene(kv_blocks=12)
    scene.run("old", [1] * 12)
    scene.run("new", [2] * 12)
    scene.run("old again", [1] * 12)
    assert scene.scheduler._homes[0].pool.free == 12
    scene.run("large", [5] * 29)  # takes 8 of 12 blocks: 6 are free
    assert scene.run("old after", [1] * 12) == 8
    assert scene.run("new after", [2] * 12) < 8


def test_a_request_that_has_room_without_the_cache_has_it_with_the_cache() -> None:
    scene = Scene(kv_blocks=12)
    scene.run("first", [1] * 40, 8)
    assert scene.run("second", [2] * 40, 8) == 0
    assert scene.run("third", [2] * 40, 8) == 36


def test_a_block_is_free_once_its_last_user_is_gone() -> None:
    pool = BlockPool(4, 4)
    first = pool.take(2)
    pool.keep(first[0], b"a")
    shared = pool.find([b"a", b"b"])
    assert shared == first[:1]
    assert pool.cost(2, shared) == 1
    second = pool.take(2, shared)
    assert (second[0], pool.used) == (first[0], 3)
    pool.give_back(first)
    assert (first, pool.used) == ([], 2)
    assert second[0] not in pool.take(2)
    with pytest.raises(ElasticError, match="asked for 1 KV blocks of which 0 are free"):
        pool.take(1)
    again = second.copy()
    pool.give_back(second)
    assert pool.find([b"a"]) == again[:1], "it is idle, and can be found"
    with pytest.raises(ElasticError, match="returned twice"):
        pool.give_back(again)


def test_content_that_two_requests_computed_is_found_once() -> None:
    pool = BlockPool(4, 4)
    first, second = pool.take(1), pool.take(1)
    pool.keep(first[0], b"a")
    pool.keep(second[0], b"a")
    assert pool.find([b"a"]) == first
    pool.give_back(second)
    assert pool.find([b"a"]) == first


def test_a_request_goes_where_its_beginning_is_unless_others_are_much_less_busy() -> None:
    scene = Scene(TWO, kv_blocks=200, max_seqs=20, max_model_len=400, max_batched_tokens=400)
    history = [5 + n % 40 for n in range(200)]
    scene.run("first", history)
    for n in range(5):
        scene.submit(f"r{n}", [*history, n + 1], 50)
        scene.step()
    assert list(scene.homes().values()) == [0, 0, 0, 0, 1], "200 cached tokens outweigh three requests"
    scene.submit("short", [7, 8], 50)
    scene.step()
    assert scene.homes()["short"] == 1


def test_what_draws_a_request_has_a_limit() -> None:
    assert crowding(4, 10_000) == crowding(0, 0)
    assert crowding(1, 16) < crowding(1, 0) < crowding(2, 16)


def test_a_dead_rank_s_cache_is_gone_and_another_s_is_used() -> None:
    scene = Scene(TWO)
    scene.run("first", PROMPT)
    scene.submit("busy", [3], 30)
    scene.submit("other", PROMPT, 20)
    scene.step()
    scene.step()
    assert scene.homes()["other"] == 1, "rank 0 is busy, and 16 tokens do not outweigh that"
    scene.scheduler.lose_ranks([1], 0.0)
    before = scene.scheduler.cached_tokens
    del scene.members[1]
    scene.members = ONE
    scene.step()
    assert scene.homes()["other"] == 0
    assert scene.scheduler.cached_tokens - before == 16
    drive(scene.scheduler, scene.ranks, scene.client, ONE)
    scene.client.check()
    scene.scheduler.set_view(view(2, {0: 12}), [], 0.0)
    scene.members = {0: 12}
    assert scene.run("new incarnation", PROMPT) == 0


def test_the_engine_reports_what_the_first_home_had_and_only_with_the_first_token() -> None:
    scene = Scene()
    scene.run("first", PROMPT)
    assert scene.scheduler.submit(ask("again", PROMPT, 6, emitted=[1]), 0.0) == []
    batch = scene.scheduler.schedule(0.0)
    assert batch is not None
    (result,) = scene.ranks.run(batch, ONE)
    (output,) = scene.scheduler.apply(result, 0.0)
    assert isinstance(output, Tokens)
    assert (output.index, output.cached) == (1, 0)


# ---- a new engine: ranks tell it what their blocks hold


class Takeover:
    """One rank under an engine, with what it was told of its blocks; then under another engine."""

    def __init__(self, **changes: object) -> None:
        self.config = config(**{"kv_blocks": 60, **changes})
        self.ranks, self.client, self.known = KvModel(4), Client(), dict[int, bytes]()
        self.engines = 0
        self.elect()

    def elect(self) -> None:
        """A new engine; gateways submit again what has not ended."""
        self.engines += 1
        self.scheduler = Scheduler(self.config, TOKEN + self.engines)
        if self.known:
            self.scheduler.holds(RankId(0, 10), self.known.copy())
        self.scheduler.set_view(view(1, ONE), [], 0.0)
        for name, request in self.client.requests.items():
            if name not in self.client.ends:
                emitted = self.client.outputs[name]
                self.client.take(self.scheduler.submit(replace(request, emitted=emitted.copy()), 0.0))

    def submit(self, name: str, prompt: list[int], max_tokens: int) -> None:
        self.client.submit(self.scheduler, ask(name, prompt, max_tokens, ignore_eos=True), 0.0)

    def step(self) -> list[int]:
        """How many tokens each chunk had."""
        batch = self.scheduler.schedule(0.0)
        assert batch is not None
        for block, name in batch.known.get(0, {}).items():
            self.known[block] = name
        self.known = {block: name for block, name in self.known.items() if name}
        for result in self.ranks.run(batch, ONE):
            self.client.take(self.scheduler.apply(result, 0.0))
        pool_is_whole(self.scheduler)
        return [len(chunk.tokens) for chunk in batch.ranks[0]]


def test_a_new_engine_goes_on_where_the_last_full_block_ends() -> None:
    scene = Takeover()
    scene.submit("a", PROMPT, 20)
    while len(scene.client.outputs["a"]) < 9:
        scene.step()
    scene.elect()
    assert scene.step() == [2], "17 + 9 tokens: all but the last block's"
    while scene.scheduler.knows("a"):
        scene.step()
    scene.client.check()


def test_engine_after_engine_under_random_requests_yields_the_same_tokens() -> None:
    """Few blocks, common beginnings: what one engine was told is evicted, and written again, under the next."""
    rng, scene, hits = random.Random(11), Takeover(kv_blocks=14), 0
    for number in range(60):
        prompt = PROMPT[: rng.randrange(4, 18)] + [rng.randrange(4, 40) for _ in range(rng.randrange(5))]
        scene.submit(f"r{number}", prompt, rng.randrange(1, 12))
        for _ in range(rng.randrange(1, 8)):
            if scene.scheduler.running + scene.scheduler.waiting:
                scene.step()
        if rng.random() < 0.4:
            scene.elect()
        hits += scene.scheduler.cached_tokens
    while scene.scheduler.running + scene.scheduler.waiting:
        scene.step()
    scene.client.check()
    assert hits > 100


def test_a_rank_that_comes_back_to_an_engine_as_it_was_forgets_what_it_held() -> None:
    scene = Takeover()
    scene.submit("a", PROMPT, 20)
    scene.step()
    scene.step()
    assert scene.known
    scene.scheduler.set_view(view(2, {1: 11}), [], 0.0)
    scene.scheduler.set_view(view(3, ONE), [], 0.0)  # the same process, and a pool that knows nothing of it
    assert scene.step() == [9]
    assert not scene.known


def test_blocks_that_no_pool_has_and_contents_that_two_blocks_hold_are_not_restored() -> None:
    pool = BlockPool(4, 4)
    pool.restore({1: b"a", 2: b"a", 9: b"c"})
    assert pool.find([b"a"]) == [1]
    assert pool.free == 4
    assert pool.news() == {0: b"", 2: b"", 3: b""}


def test_without_the_cache_a_new_engine_finds_nothing() -> None:
    scene = Takeover(prefix_cache=False)
    scene.submit("a", PROMPT, 20)
    scene.step()
    scene.known = {1: b"a"}
    scene.elect()
    assert scene.step() == [9]
