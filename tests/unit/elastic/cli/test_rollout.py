"""A rollout in a cluster in miniature: it replaces every rank, or stops before a serving one is drained."""

from __future__ import annotations

import threading

import pytest

from elastic.cli.client import StoreClient
from elastic.cli.rollout import last_incarnation, rollout
from membership.base.errors import ElasticError
from tests.support.world import World

pytestmark = pytest.mark.unit


class Waiting(threading.Event):
    """While the rollout waits, the cluster does what there is to do."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def wait(self, timeout: float | None = None) -> bool:
        self._world.settle()
        return False


def up() -> tuple[World, StoreClient]:
    world = World(desired=3)
    world.settle()
    return world, StoreClient(world.store, world.config.cluster, None)


def test_each_rank_is_replaced_and_the_size_is_as_before() -> None:
    world, client = up()
    before = last_incarnation(client)
    seen = [operation.id for operation in rollout(client, before, 60.0, Waiting(world))]
    assert seen[0] == f"rollout-{before}-surge"
    world.assert_whole(3)
    assert world.state.view is not None
    assert min(member.incarnation for member in world.state.view.members) > before


def test_a_rollout_that_would_bring_in_another_model_is_rolled_back_before_any_rank_is_drained() -> None:
    world, client = up()
    world.others = {0, 1, 2, 3}
    before = world.state.view
    with pytest.raises(ElasticError, match=r"was rolled back: .* has another model than the cluster serves") as refused:
        list(rollout(client, last_incarnation(client), 60.0, Waiting(world)))
    assert "elastic rollout" in refused.value.hint
    world.assert_whole(3)
    assert world.state.view == before
