"""Which listeners of other hosts `elastic doctor --cluster` tries, and what it says of them."""

from __future__ import annotations

import socket

import msgspec
import pytest
from msgspec.structs import replace

from elastic.cli.hosts import examine_hosts
from elastic.cli.reach import Listener, Reached, by_node, listeners, not_listening, reach
from elastic.serve.options import StoreOptions
from membership.base.rank_id import RankId
from membership.store.records import AgentRecord, ClusterState, EngineRecord
from tests.support.cluster_states import healthy, record
from workers.protocol.exchange_handle import AutoHandle, TcpHandle
from workers.queue.handle import Handle

pytestmark = pytest.mark.unit

HERE, THERE = "boot/1", "boot/2"


def on_host_b(host: str = THERE) -> ClusterState:
    """The engine and rank 1 are on host b."""
    rows = AutoHandle(host, b"shm", msgspec.msgpack.encode(TcpHandle("tcp://10.0.0.2:3", b"key")))
    rank = replace(
        record(1), node="b", response_handle=Handle("q", "msgpack", host, "/x", "tcp://10.0.0.2:2").encode(),
        exchange_handle=msgspec.msgpack.encode(rows),
    )  # fmt: skip
    engine = EngineRecord(
        node="b", pid=1, address="ipc:///x", mask_handle=b"", host=host, remote="tcp://10.0.0.2:0",
        broadcast_handle=Handle("q", "msgpack", host, "/x", "tcp://10.0.0.2:1").encode(),
    )  # fmt: skip
    agent = AgentRecord(
        node="b", pid=4, started=1.0, host=host, weights_at="tcp://10.0.0.2:4",
        notices=Handle("q", "msgpack", host, "/x", "tcp://10.0.0.2:5").encode(),
    )  # fmt: skip
    return healthy(
        engine=engine, agents={**healthy().agents, "b": agent}, ranks={RankId(0, 1): record(0), RankId(1, 2): rank}
    )


def test_all_that_other_hosts_listen_with_is_tried() -> None:
    assert list(listeners(on_host_b(), HERE)) == [
        Listener("b", "the engine, for gateways", "tcp://10.0.0.2:0"),
        Listener("b", "the engine's steps", "tcp://10.0.0.2:1"),
        Listener("b", "the agent's weights", "tcp://10.0.0.2:4"),
        Listener("b", "the agent's notices of deaths", "tcp://10.0.0.2:5"),
        Listener("b", "rank 1's answers", "tcp://10.0.0.2:2"),
        Listener("b", "rank 1's rows", "tcp://10.0.0.2:3"),
    ]
    assert list(listeners(on_host_b(HERE), HERE)) == [], "this host's own"
    assert list(listeners(healthy(), HERE)) == [], "a cluster on one host"


def test_an_agent_that_does_not_listen_is_named() -> None:
    """It could not, or is of an older version: no port is there that could be tried, and all goes on without."""
    state = on_host_b()
    assert list(not_listening(state, HERE)) == []
    agent = state.agents["b"]
    near = Handle("q", "msgpack", THERE, "/x", "").encode()
    for less, what in (
        (replace(agent, notices=b""), "notices of deaths"),
        (replace(agent, notices=near), "notices of deaths"),
        (replace(agent, weights_at=""), "requests for weights"),
        (replace(agent, notices=b"", weights_at=""), "notices of deaths or requests for weights"),
    ):
        there = replace(state, agents={**state.agents, "b": less})
        (found,) = not_listening(there, HERE)
        assert (found.what, found.level) == ("host b", "warn")
        assert found.message == f"its agent does not listen for {what}, or is of an older version"
        assert "deaths_not_reported" in found.hint
        assert list(not_listening(there, THERE)) == [], "this host's own"
    assert list(not_listening(healthy(), HERE)) == [], "a cluster on one host"


def test_what_cannot_be_reached_is_named_by_its_host() -> None:
    engine, rows = Listener("b", "the engine's steps", "tcp://x:1"), Listener("b", "rank 1's rows", "tcp://x:3")
    near = Reached(0.001, 1500, 1488)
    other = Listener("a", "rank 0's rows", "tcp://y:1")
    fine, wrong = by_node({engine: near, rows: "no answer in 2 s", other: near})
    assert (fine.what, fine.level, "all 1 listeners" in fine.message) == ("host a", "ok", True)
    assert (wrong.what, wrong.level) == ("host b", "fail")
    assert wrong.message == "1 of 2 listeners are not reached from here: rank 1's rows at tcp://x:3: no answer in 2 s"
    assert "docs/HOSTS.md" in wrong.hint


def test_a_host_that_takes_smaller_packets_than_this_one_sends_is_named() -> None:
    """A connection keeps a few bytes of each packet for itself: they are no difference."""
    jumbo, plain = Listener("a", "it", "tcp://x:1"), Listener("b", "it", "tcp://y:1")
    found = list(by_node({jumbo: Reached(0.001, 9000, 1488), plain: Reached(0.001, 9000, 8988)}))
    assert [(each.what, each.level) for each in found] == [("host a", "ok"), ("host a", "warn"), ("host b", "ok")]
    assert "packets of 1488 bytes at most, where this host sends 9000" in found[1].message


def test_a_connection_is_made_or_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reached = reach(f"tcp://127.0.0.1:{port}")
        assert isinstance(reached, Reached)
        assert [each.level for each in by_node({Listener("a", "it", "tcp://y:1"): reached})] == ["ok"], reached
    assert reach(f"tcp://127.0.0.1:{port}") == "refused"


def test_a_store_that_is_not_there_is_a_finding() -> None:
    (found,) = examine_hosts(StoreOptions(etcd=("127.0.0.1:1",), cluster="moe"), None)
    assert (found.what, found.level) == ("cluster", "fail")
