"""`elastic keys rotate` in a cluster in miniature: all listen with the new secret, and an interrupted one goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from msgspec.structs import replace

from elastic.cli.client import StoreClient
from elastic.cli.render import rotation_view, secrets_view
from elastic.cli.rotation import ROUNDS, lacks_its_end, rotate
from membership.base.errors import ElasticError, PlanRefused, WaitTimeout
from membership.operations.rotate_keys import RotationPlan, name_of
from membership.store.records import EngineRecord, Operation
from tests.support.world import CONFIG, World

pytestmark = pytest.mark.unit

OLD, NEW = "old key", "new key"
BOTH = tuple(sorted((OLD, NEW)))


class Hosts(threading.Event):
    """While the rotation waits, hosts do what there is to do: their agents note with what a new rank listens."""

    def __init__(self, world: World, stops_after: int = 10_000) -> None:
        super().__init__()
        self._world, self._left = world, stops_after
        self.engine_follows = True

    def wait(self, timeout: float | None = None) -> bool:
        world = self._world
        world.settle()
        note(world)
        state = world.state
        assert state.config is not None
        if self.engine_follows and state.engine and state.engine.join_key != state.config.join_key:
            listen(world, state.config.join_key)
        self._left -= 1
        if self._left <= 0:
            self.set()
        return self.is_set()


def note(world: World) -> None:
    state = world.state
    assert state.config is not None
    for (rank, incarnation), record in state.ranks.items():
        if not record.join_key:
            world.put(world.keys.rank(rank, incarnation), replace(record, join_key=state.config.join_key))


def listen(world: World, key: str) -> None:
    """The engine begins a term with this secret."""
    world.start_engine()
    engine = world.state.engine
    assert isinstance(engine, EngineRecord)
    world.put(world.keys.engine, replace(engine, join_key=key))
    world.settle()


def up() -> tuple[World, StoreClient]:
    world = World(desired=3, config=replace(CONFIG, join_key=OLD), join_keys=BOTH)
    listen(world, OLD)
    note(world)
    for node in world.nodes:
        world.put(world.keys.agent(node), replace(world.state.agents[node], join_keys=BOTH))
    return world, StoreClient(world.store, world.config.cluster, None)


def listening(world: World) -> set[str]:
    engine = world.state.engine
    assert engine is not None
    return {record.join_key for record in world.state.ranks.values()} | {engine.join_key}


def test_all_listen_with_the_new_secret_and_the_size_is_as_before() -> None:
    world, client = up()
    assert "ranks 0, 1, 2" in rotation_view(client.plan_rotation())
    list(rotate(client, 60.0, Hosts(world)))
    assert listening(world) == {NEW}
    world.assert_whole(3)
    plan = client.plan_rotation()
    assert not lacks_its_end(client, plan)
    assert (plan.changes, plan.refused) == (False, "")
    assert "nothing to do" in rotation_view(plan)
    assert world.state.config is not None
    assert world.state.config.join_keys_retired == (OLD,)
    assert f"{name_of(OLD)} is used no more: its line may go" in secrets_view(client.secrets())


@pytest.mark.parametrize("waits", range(1, 9))
def test_an_interrupted_one_goes_on(waits: int) -> None:
    """Under the ids of the first, so that no rank too many is left."""
    world, client = up()
    list(rotate(client, 60.0, Hosts(world, stops_after=waits)))
    shown, in_use = secrets_view(client.secrets()), listening(world)
    assert (f"{name_of(OLD)} (generation 0) is still in use" in shown) is (OLD in in_use)
    Hosts(world).wait()
    list(rotate(client, 60.0, Hosts(world)))
    assert listening(world) == {NEW}
    assert not client.plan_rotation().changes
    assert "its line may go" in secrets_view(client.secrets())
    world.assert_whole(3)


def test_an_engine_that_does_not_follow_is_named_and_no_rank_is_replaced() -> None:
    world, client = up()
    hosts = Hosts(world)
    hosts.engine_follows = False
    before = set(world.state.ranks)
    with pytest.raises(WaitTimeout, match="the engine still listens with the old join secret"):
        list(rotate(client, 0.0, hosts))
    assert set(world.state.ranks) == before


@pytest.mark.parametrize("stopped", [True, False])
def test_one_that_is_stopped_in_its_last_round_blames_no_host(monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    """Its ranks are not replaced yet; they were not started with the old secret again."""
    stop, rounds = threading.Event(), []

    class Left(StoreClient):
        def plan_rotation(self) -> RotationPlan:
            return RotationPlan(begun=True, ranks=(0,), before=4)

        def rotate_keys(self, generation: int) -> RotationPlan:
            return self.plan_rotation()

    def rollout(*_: object) -> Iterator[Operation]:
        rounds.append(0)
        if stopped and len(rounds) == ROUNDS:
            stop.set()
        yield from ()

    monkeypatch.setattr("elastic.cli.rotation.rollout", rollout)
    with nullcontext() if stopped else pytest.raises(ElasticError, match="old join secret again"):
        list(rotate(Left(up()[0].store, CONFIG.cluster, None), 60.0, stop))
    assert len(rounds) == ROUNDS


def test_without_a_new_secret_it_is_refused() -> None:
    world, client = up()
    world.join_keys = (OLD,)
    world.put(world.keys.agent("a"), replace(world.state.agents["a"], join_keys=(OLD,)))
    world.settle()
    with pytest.raises(PlanRefused, match="no host has another join secret"):
        list(rotate(client, 60.0, Hosts(world)))
