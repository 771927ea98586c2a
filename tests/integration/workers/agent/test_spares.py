"""An agent's warm spares, with real processes: made when all is well, taken at a death, replaced, and done without."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from membership.base.rank_id import RankId
from membership.store.in_memory import MemoryStore
from tests.support.agent_scene import Scene, agent
from tests.support.helpers import eventually, hang

pytestmark = pytest.mark.integration

A, B, C = RankId(0, 1), RankId(1, 2), RankId(1, 3)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    store = MemoryStore()
    made = Scene(store, tmp_path / "events.jsonl")
    made.configure()
    yield made
    store.close()


def serve(scene: Scene, epoch: int, *keys: RankId) -> None:
    """Have these ranks, and no others, in the committed view."""
    scene.assign(*keys)
    scene.until_registered(*keys)
    revision = scene.stage(epoch, *keys)
    scene.until(lambda s: all(s.ranks[key].prepared_revision == revision for key in keys), "all prepared")
    scene.commit()


def spare(scene: Scene, but: int = 0) -> int:
    """The spare's pid, once there is one that waits (other than `but`)."""

    def waits() -> int:
        found = [pid for pid in scene.state().agents["n"].spares if pid != but]
        return found[0] if found else 0

    return eventually(waits, 30, "a spare")


def kill(scene: Scene, key: RankId) -> None:
    os.kill(scene.state().ranks[key].pid, signal.SIGKILL)
    scene.until(lambda s: key not in s.ranks and key.rank in s.exits, "the death published")


def test_a_spare_takes_the_place_of_a_dead_rank_and_is_replaced_afterwards(scene: Scene) -> None:
    with agent(scene, spares=1):
        scene.assign(A, B)
        scene.until_registered(A, B)
        assert scene.events("spare_ready") == [], "none before the ranks serve"
        serve(scene, 1, A, B)
        first = spare(scene)
        assert scene.state().agents["n"].spares_wanted == 1
        kill(scene, B)
        scene.assign(A, C)
        taken = scene.until_registered(A, C).ranks[C]
        assert taken.pid == first
        assert taken.exchange_handle == b"exchange-1-3", "peers reach it as that rank"
        assert psutil.Process(first).cmdline()[0].startswith("elastic-ep::Worker_DP1_EP1")
        assert scene.state().agents["n"].spares == ()
        serve(scene, 2, A, C)
        assert spare(scene) != first
        kill(scene, C)
        state = scene.until(lambda s: s.exits[1].incarnation == 3, "its death published as the rank's")
        assert state.exits[1].restarts == 2
        assert scene.events("rank_died")[-1].fields["pid"] == first
    assert len(scene.events("spare_ready")) == 2
    eventually(lambda: not psutil.pid_exists(first), 30, "it to be gone")


def test_a_spare_that_dies_is_replaced_and_no_slot_pays_for_it(scene: Scene) -> None:
    with agent(scene, spares=1):
        serve(scene, 1, A, B)
        first = spare(scene)
        os.kill(first, signal.SIGKILL)
        second = spare(scene, but=first)
        assert scene.state().exits == {}
        assert [event.fields["pid"] for event in scene.events("spare_lost")] == [first]
        hang(second)
        kill(scene, B)
        scene.assign(A, C)
        assert scene.until_registered(A, C).ranks[C].pid != second, "a stopped spare succeeds no rank"
        eventually(lambda: not psutil.pid_exists(second), 30, "the stopped spare killed")


def test_a_rank_starts_where_the_spare_will_not_become_it(scene: Scene) -> None:
    scene.configure("fail-become")
    with agent(scene, spares=1):
        serve(scene, 1, A, B)
        first = spare(scene)
        kill(scene, B)
        scene.assign(A, C)
        assert scene.until_registered(A, C).ranks[C].pid != first
        [lost] = scene.events("spare_lost")
        assert "this worker stays what it is" in lost.fields["reason"]
        eventually(lambda: not psutil.pid_exists(first), 30, "the useless spare killed")


def test_spares_that_cannot_start_are_retried_and_harm_no_rank(scene: Scene) -> None:
    scene.configure("fail-at-start--1")
    with agent(scene, spares=1):
        serve(scene, 1, A, B)
        eventually(lambda: len(scene.events("spare_lost")) >= 3, 60, "three attempts")
        assert scene.state().ranks.keys() == {A, B}
        assert scene.state().exits == {}
