"""The simulated network: TCP over links that are cut, and what the shipped engine makes of silent hosts."""

from __future__ import annotations

from random import Random

import pytest
from msgspec.structs import replace

from chaos.simulation.clock import Clock
from chaos.simulation.cluster import SERVED, Cluster
from chaos.simulation.episode import _quiet_logs
from chaos.simulation.host_faults import both
from chaos.simulation.network import ETCD, Network, Stream, Way, resent_at
from membership.base import failpoints

pytestmark = pytest.mark.unit

HOSTS = ("a", "b", "c")


def test_what_a_cut_keeps_back_is_sent_again_at_intervals_that_double() -> None:
    assert [resent_at(1.0, healed) for healed in (1.1, 1.2, 1.3, 1.7, 2.5)] == pytest.approx([1.2, 1.2, 1.6, 2.4, 4.0])


class Line:
    """A stream between two hosts, and what has come out of it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.network = Network(self.clock, Random(1), HOSTS)
        self.stream = Stream(self.network, self.clock, "a", "b")
        self.arrived: list[tuple[str, float]] = []

    def send(self, name: str, delay_s: float = 0.001) -> None:
        self.stream.send(delay_s, self.came, name)

    def came(self, name: str) -> None:
        self.arrived.append((name, round(self.clock.now, 3)))


def test_all_arrives_once_and_in_order_after_a_cut() -> None:
    line = Line()
    line.send("first", 0.01)
    line.network.cut([("a", "b")])
    line.send("second")
    line.clock.run(0.5)
    assert line.arrived == [("first", 0.01)], "what was under way arrives"
    line.network.heal([("a", "b")])
    line.send("third")
    line.clock.run(2.0)
    assert line.arrived[1:] == [("second", 0.601), ("third", 0.601)], "not before it is sent again"


def test_a_one_way_cut_keeps_one_direction_back() -> None:
    line = Line()
    line.network.cut([("b", "a")])
    line.send("heard")
    line.clock.run(0.1)
    assert line.arrived == [("heard", 0.001)]
    assert not line.network.connected("a", "b")
    assert not line.network.connected("b", "a")


def test_each_cut_heals_alone() -> None:
    line = Line()
    line.network.cut([("a", "b")])
    line.network.cut(both("a", ["b", "c"]))
    line.network.heal([("a", "b")])
    assert not line.network.passes("a", "b")
    line.network.heal(both("a", ["b", "c"]))
    assert line.network.connected("a", "b")


def test_a_host_that_has_lost_its_power_says_only_that_its_connections_are_gone() -> None:
    line = Line()
    line.network.cut([("a", "b")])
    line.send("lost")
    line.network.boots["a"] += 1
    line.stream.finish(0.001, line.came, "reset")
    line.network.heal([("a", "b")])
    line.clock.run(2.0)
    assert [name for name, _ in line.arrived] == ["reset"]


class Served:
    """Three hosts that serve with six ranks, some on each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster = Cluster("hosts", HOSTS, 6, replace(SERVED, min_agents=3), hosts=True)
        monkeypatch.setattr(failpoints, "_armed", self.cluster.failpoints)
        with _quiet_logs():
            while self.cluster.trouble():
                self.run(0.5)
        engine = self.cluster.engine
        assert engine is not None
        self.engine, self.here = engine, engine.at
        self.there = next(host for host in HOSTS if host != self.here)
        assert {rank.at for rank in self.cluster.ranks.values()} == {*HOSTS}

    def run(self, seconds: float) -> None:
        with _quiet_logs():
            failpoints._armed = self.cluster.failpoints  # type: ignore[assignment]
            self.cluster.clock.run(self.cluster.clock.now + seconds)
        assert self.cluster.violation is None
        assert self.cluster.clock.now < 60

    def attached(self, host: str) -> set[int]:
        """Ranks of that host which the engine uses."""
        fleet = self.engine.fleet
        assert fleet is not None
        return {key.rank for key in fleet._links if self.cluster.ranks[key].at == host}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(monkeypatch)


@pytest.mark.parametrize("way", ["both", "there", "back"])
def test_a_silent_host_is_given_up_whichever_way_is_cut(served: Served, way: str) -> None:
    """One-way, too: who hears the other lacks its acknowledgements all the same."""
    ways: dict[str, list[Way]] = {
        "both": both(served.here, [served.there]),
        "there": [(served.here, served.there)],
        "back": [(served.there, served.here)],
    }
    served.cluster.network.cut(ways[way])
    served.run(0.15)
    assert served.attached(served.there)
    served.run(0.2)
    assert not served.attached(served.there)
    assert served.attached(served.here)


def test_an_engine_that_is_cut_off_itself_gives_nobody_up(served: Served) -> None:
    others = [host for host in HOSTS if host != served.here]
    before = {host: served.attached(host) for host in HOSTS}
    ways = both(served.here, [*others, ETCD])
    served.cluster.network.cut(ways)
    served.run(0.6)
    assert {host: served.attached(host) for host in HOSTS} == before
    served.cluster.network.heal(ways)
    served.run(1.0)
    assert {host: served.attached(host) for host in HOSTS} == before


def test_a_host_without_power_is_replaced_and_one_that_is_back_joins_again(served: Served) -> None:
    ways = both(served.there, [*(host for host in HOSTS if host != served.there), ETCD])
    served.cluster.lose_power(served.there, ways)
    served.run(0.5)
    fleet = served.engine.fleet
    assert fleet is not None
    assert all(key in served.cluster.ranks for key in fleet._links)
    served.run(5.0)
    assert {member.node for member in served.cluster.store.state.view.members} == {*HOSTS} - {served.there}  # type: ignore[union-attr]
    served.cluster.power_back(served.there, ways)
    served.run(2.0)
    assert served.there in served.cluster.store.state.agents
