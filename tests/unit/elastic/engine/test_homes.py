"""Which rank a request gets: apart where ranks have cores of their own, together where one fills its host."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec.structs import replace

from chaos.simulation.kv_model import KvModel
from elastic.engine.scheduler import Scheduler
from membership.base.enums import Homes
from membership.store.records import Member, View
from tests.support.rank_model import TOKEN, Client, ask, config, view

pytestmark = pytest.mark.unit


class Scene:
    """Ranks 0, 1, … on the hosts that `nodes` names, and a scheduler that has begun to serve."""

    def __init__(self, nodes: str, *, fills: bool, homes: Homes = Homes.TOGETHER, kv_blocks: int = 60) -> None:
        self.members, self.fills = {rank: 10 + rank for rank in range(len(nodes))}, fills
        placed = tuple(Member(rank=r, node=nodes[r], incarnation=i) for r, i in self.members.items())
        self.scheduler = Scheduler(config(kv_blocks=kv_blocks, max_seqs=5, homes=homes), TOKEN)
        placement = view(1, self.members).placement
        self.scheduler.set_view(View(epoch=1, members=placed, placement=placement), [], 0.0)
        self.ranks, self.client, self.asked = KvModel(4), Client(), 0

    def ask(self, tokens: int = 30) -> str:
        self.asked += 1
        name = f"r{self.asked}"
        self.client.submit(self.scheduler, ask(name, [self.asked], tokens, ignore_eos=True), 0.0)
        self.step()
        return name

    def step(self) -> None:
        batch = self.scheduler.schedule(0.0)
        assert batch is not None
        for result in self.ranks.run(batch, self.members):
            self.client.take(self.scheduler.apply(replace(result, fills_host=self.fills), 0.0))

    def homes(self) -> dict[int, int]:
        """Rank -> requests that it runs."""
        return dict(Counter(h.rank for h in self.scheduler._homes.values() for _ in h.running))


@pytest.mark.parametrize(
    ("fills", "asked", "homes"),
    [
        (False, Homes.TOGETHER, {0: 2, 1: 2, 2: 2, 3: 2}),
        (True, Homes.TOGETHER, {0: 4, 2: 4}),
        (True, Homes.APART, {0: 2, 1: 2, 2: 2, 3: 2}),
    ],
)
def test_requests_of_a_host_stay_together_where_one_rank_fills_it(
    *, fills: bool, asked: Homes, homes: dict[int, int]
) -> None:
    """If that was asked for. Two ranks would read most experts twice. Hosts share the requests either way."""
    scene = Scene("aabb", fills=fills, homes=asked)
    for _ in range(4):
        name = scene.ask(1)  # so that each host has said it
        assert not scene.scheduler.knows(name)
    for _ in range(8):
        scene.ask()
    assert scene.homes() == homes


def test_the_host_s_other_ranks_take_what_the_first_has_no_place_for() -> None:
    scene = Scene("aa", fills=True)
    for _ in range(8):
        scene.ask()
    assert scene.homes() == {0: 5, 1: 3}


def test_none_is_put_off_because_they_are_together() -> None:
    """Each may become 31 tokens long, which is 8 blocks: 20 blocks are enough for two of them to the end."""
    scene = Scene("aa", fills=True, kv_blocks=20)
    for _ in range(4):
        scene.ask()
    assert scene.homes() == {0: 2, 1: 2}
    while scene.homes():
        scene.step()
    assert scene.scheduler.preemptions == 0
    scene.client.check()


def test_they_go_on_together_where_their_rank_dies() -> None:
    scene = Scene("aab", fills=True)
    for _ in range(6):
        scene.ask()
    before = scene.homes()
    assert before == {0: 3, 2: 3}
    assert len(scene.scheduler.lose_ranks([0], 0.0)) == 3
    scene.step()
    assert scene.homes() == {1: 3, 2: 3}
