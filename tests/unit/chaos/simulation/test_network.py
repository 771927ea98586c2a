"""The simulated network: TCP over links that are cut, and what the shipped engine makes of silent hosts."""

from __future__ import annotations

from random import Random

import pytest
from msgspec.structs import replace

from chaos.simulation.clock import Clock
from chaos.simulation.cluster import SERVED, Cluster
from chaos.simulation.episode import _quiet_logs
from chaos.simulation.host_faults import both
from chaos.simulation.invariants import Violation
from chaos.simulation.network import ETCD, Network, Stream, Way, resent_at
from elastic.gateway.engine_link import EngineLink
from elastic.gateway.journal import Journal
from elastic.protocol import Tokens
from membership.base import failpoints
from membership.base.rank_id import RankId

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


def test_each_fault_that_slows_a_link_or_loses_packets_ends_alone() -> None:
    """The first one's end is not the second one's, and what is worse counts meanwhile."""
    line = Line()
    slow, lossy = [line.network.slow_down, line.network.lose]
    found = list[tuple[float, float]]()

    def look() -> None:
        by_s = line.network._slow["a", "b"].now(), line.network._lossy["a", "b"].now()
        found.append(by_s)

    for at_s, worse in ((0.0, 2), (2.0, 1)):
        line.clock.after(at_s, slow, ("a", "b"), worse * 0.02, 4.0)
        line.clock.after(at_s, lossy, ("a", "b"), worse * 0.1, 4.0)
    for at_s in (3.0, 5.0, 7.0):
        line.clock.after(at_s, look)
    line.clock.run(5.5)
    assert found == [(0.04, 0.2), (0.02, 0.1)]
    assert line.network.extra_s("a", "b") >= 0.02
    line.clock.run(7.0)
    assert found[-1] == (0.0, 0.0)
    assert line.network.extra_s("a", "b") == 0.0


def test_each_fault_that_slows_all_messages_ends_alone() -> None:
    cluster = Cluster("lag", ("a",), 2)
    cluster.slow_down(0.2, 3.0)
    cluster.slow_down(0.05, 0.1)
    cluster.clock.run(0.5)
    assert max(cluster.delay() for _ in range(100)) > 0.1
    cluster.clock.run(3.5)
    assert max(cluster.delay() for _ in range(100)) <= 0.004


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


def test_a_host_without_power_reports_no_death_even_when_it_is_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent is gone with its ranks. Only without its word does the engine do what it does about a lost host."""
    heard, fleet = list[RankId](), served.engine.fleet
    assert fleet is not None
    arrived = fleet.reported.arrived
    monkeypatch.setattr(fleet.reported, "arrived", lambda key: (heard.append(key), arrived(key)))
    there, *_ = [rank for rank in served.cluster.ranks.values() if rank.at == served.there]
    there.die()
    served.run(0.1)
    assert heard == [there.key], "its agent lives, and tells the engine"
    ways = both(served.there, [*(host for host in HOSTS if host != served.there), ETCD])
    served.cluster.lose_power(served.there, ways)
    served.run(0.25)
    served.cluster.power_back(served.there, ways)
    served.run(2.0)
    assert heard == [there.key]


def test_tokens_of_an_older_engine_after_those_of_a_newer_one_are_noticed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what each message says of itself. As shipped, link and journal drop them; without both, a client has them."""
    cluster, gateway = served.cluster, served.cluster.gateway
    gateway.submit("r", [1, 2, 3], 8)
    while not (received := gateway.requests["r"].tokens):
        served.run(0.002)
    assert gateway.connection is not None
    older = Tokens(served.engine.token - 1, "r", len(received), gateway.requests["r"].expected[0][len(received) :][:1])
    before = list(received)
    gateway.received(gateway.connection, older)
    assert received == before
    monkeypatch.setattr(EngineLink, "_receive", lambda link, message, target: link._handle(message))
    monkeypatch.setattr(Journal, "_addressed", lambda journal, message: journal._open.get(message.request_id))
    with pytest.raises(Violation, match=f"has tokens of engine {older.engine_token}, after {served.engine.token}"):
        gateway.received(gateway.connection, older)
    assert cluster.violation is None


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
