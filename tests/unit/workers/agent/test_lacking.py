"""When a node's agent is ready: once all that is meant for the node serves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from tests.support.world import CONFIG, World
from workers.agent.decide import lacking

pytestmark = pytest.mark.unit
FOLLOWING = replace(CONFIG, follow_agents=2)


def said(world: World, node: str) -> str:
    return lacking(world.state, world.state.agents[node], frozenset(), world.now)


@dataclass
class Heard:
    """All that an agent says, from its start until nothing more happens."""

    world: World
    node: str
    words: list[str] = field(default_factory=list)

    def settle(self) -> list[str]:
        def listen() -> bool:
            if (words := said(self.world, self.node)) not in self.words[-1:]:
                self.words.append(words)
            return False

        self.world.settle(until=listen)
        return self.words


def test_an_agent_is_ready_when_its_ranks_are_members_and_not_before() -> None:
    world = World(nodes=("a", "b"))
    words = Heard(world, "b").settle()
    assert words == ["4 ranks have no host yet", "ranks [1, 3] do not serve yet", ""]


def test_a_new_agent_that_the_size_follows_waits_for_its_own_ranks() -> None:
    world = World(nodes=("a",), config=FOLLOWING)
    world.settle()
    assert said(world, "a") == ""
    world.start_agent("b")
    words = Heard(world, "b").settle()
    assert words[0] == "the cluster's size does not count this agent yet"
    assert words[-2:] == ["ranks [2, 3] do not serve yet", ""]
    assert said(world, "a") == "", "the other one has been ready all along"


def test_an_agent_that_is_back_waits_for_ranks_of_its_own_run() -> None:
    world = World(nodes=("a", "b"), config=FOLLOWING)
    world.settle()
    earlier = world.state.agents["b"]
    world.stop_agent("b")
    assert lacking(world.state, earlier, frozenset(), world.now) == "the cluster does not know this agent yet"
    world.start_agent("b")
    assert lacking(world.state, earlier, frozenset(), world.now) == "the cluster does not know this agent yet"
    assert said(world, "b") == "2 ranks have no host yet"
    assert Heard(world, "b").settle()[-1] == ""
    world.assert_whole(4)


def test_an_agent_for_which_there_is_nothing_to_do_is_ready() -> None:
    world = World(nodes=("a",))
    world.settle()
    world.start_agent("b")
    world.settle()
    assert said(world, "b") == ""


def test_a_slot_that_is_set_aside_holds_no_agent_up() -> None:
    """Else a rolling update that could mend it would wait for ever."""
    world = World(nodes=("a", "b"))
    world.settle()
    world.kill(0, quarantined=True)
    world.settle()
    assert [said(world, node) for node in ("a", "b")] == ["", ""]


@pytest.mark.parametrize("refused", [True, False])
def test_an_agent_whose_ranks_were_set_aside_is_not_ready(refused: bool) -> None:
    """Else a rolling update to what cannot serve would go on until nothing is left that does."""
    world = World(nodes=("a", "b"), config=FOLLOWING)
    world.settle()
    assert world.state.view is not None
    ((mine, node),) = ((member.id, member.node) for member in world.state.view.members if member.rank == 1)
    world.kill(1, quarantined=True, refused=refused)
    world.settle()
    assert lacking(world.state, world.state.agents[node], {mine}, world.now).startswith("ranks [1] were set aside here")
    assert said(world, node) == "", "an earlier run's"
