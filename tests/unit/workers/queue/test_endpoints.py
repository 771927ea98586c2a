"""Listening for other hosts: IPv4 and IPv6, at any port or at one of a range."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import zmq

from membership.base.errors import ConfigError
from membership.base.network import ANY_PORT, Ports, bare, is_loopback, ports_of
from tests.support.ipv6 import needs_ipv6
from workers.queue.endpoints import connect, listen_for_hosts

pytestmark = pytest.mark.unit

Open = Callable[[int], zmq.Socket[bytes]]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens sockets of a kind, and closes them all."""
    with ExitStack() as ends:
        context: zmq.Context[zmq.Socket[bytes]] = ends.enter_context(zmq.Context())
        yield lambda kind: ends.enter_context(context.socket(kind))


def test_each_port_of_a_range_serves_one_listener_and_then_there_is_none(opened: Open) -> None:
    """At an address of this process's own, where no test that runs beside listens."""
    high, low = divmod(os.getpid() % 65_000, 256)
    mine, ports = f"127.1.{high}.{low}", Ports(7400, 7402)
    found = {listen_for_hosts(opened(zmq.ROUTER), mine, ports) for _ in range(3)}
    assert found == {f"tcp://{mine}:{port}" for port in range(ports.first, ports.last + 1)}
    with pytest.raises(ConfigError, match=f"no port of --port-range {ports.first}-{ports.last} is free") as refused:
        listen_for_hosts(opened(zmq.ROUTER), mine, ports)
    assert "for each rank" in refused.value.hint


def test_an_address_that_is_not_ours_is_not_taken_for_a_lack_of_ports(opened: Open) -> None:
    with pytest.raises(zmq.ZMQError, match="Cannot assign requested address"):
        listen_for_hosts(opened(zmq.ROUTER), "203.0.113.7", Ports(7000, 7001))


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", pytest.param("::1", marks=needs_ipv6)])
def test_what_is_advertised_can_be_connected_to(opened: Open, address: str) -> None:
    server, client = opened(zmq.PULL), opened(zmq.PUSH)
    endpoint = listen_for_hosts(server, address)
    connect(client, endpoint)
    client.send(b"it works")
    assert server.poll(30_000), endpoint
    assert server.recv() == b"it works"


def test_ranges_are_read_and_refused() -> None:
    assert ports_of("") == ANY_PORT
    assert ports_of("7000-7099") == Ports(7000, 7099)
    assert ports_of("7000") == Ports(7000, 7000)
    for text in ("x", "7099-7000", "0-5", "1-65536", "-", "-1", "7000-7001-7002"):
        with pytest.raises(ConfigError, match="is no range of ports"):
            ports_of(text)


def test_ipv6_addresses_with_brackets_and_without() -> None:
    assert (bare("[fd00::1]"), bare("fd00::1"), bare("10.0.0.1"), bare("host-a")) == (
        "fd00::1", "fd00::1", "10.0.0.1", "host-a",
    )  # fmt: skip
    assert is_loopback("::1")
    assert not is_loopback("fd00::1")
