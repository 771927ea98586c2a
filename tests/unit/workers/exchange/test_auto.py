"""The transport that chooses for each peer: shared memory on one host, TCP to another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import msgspec
import pytest

from membership.base.errors import RankDied
from membership.base.network import Network
from membership.base.rank_id import RankId
from tests.support.helpers import eventually
from tests.support.ipv6 import needs_ipv6
from workers.exchange.auto import Auto
from workers.exchange.links import Links
from workers.exchange.shm.link import ShmLink
from workers.exchange.tcp.link import TcpLink
from workers.exchange.transports import between_hosts
from workers.ipc.doorbell import Doorbell
from workers.protocol.exchange_handle import AutoHandle

pytestmark = pytest.mark.unit

NETWORK = Network("127.0.0.1", "moe", b"a secret of the tests' cluster")
OTHER = Network("127.0.0.1", "moe", b"another secret, no less long")
A, B = RankId(0, 1), RankId(1, 2)
WAIT_S = 30.0
Rank = Callable[[RankId, Network | None], tuple[Links, Auto]]


@pytest.fixture
def rank() -> Iterator[Rank]:
    with ExitStack() as ends:

        def make(me: RankId, network: Network | None) -> tuple[Links, Auto]:
            bell = Doorbell()
            ends.callback(bell.close)
            links = Links(me, bell)
            transport = between_hosts(network)(links)
            assert isinstance(transport, Auto)
            ends.callback(links.close)
            ends.callback(transport.close)
            return links, transport

        yield make


def far(handle: bytes) -> bytes:
    return msgspec.msgpack.encode(
        msgspec.structs.replace(msgspec.msgpack.decode(handle, type=AutoHandle), host="another host")
    )


def dial(transport: Auto, peer: RankId, handle: bytes) -> None:
    transport.dial(peer, handle, time.monotonic() + WAIT_S)


def test_on_one_host_memory_is_shared(rank: Rank) -> None:
    (ours, a), (theirs, b) = rank(A, NETWORK), rank(B, NETWORK)
    dial(b, A, a.handle())
    assert [type(link) for link in (*ours.live, *theirs.live)] == [ShmLink, ShmLink]


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_to_another_host_rows_go_over_tcp_and_the_end_of_either_side_is_seen(rank: Rank, address: str) -> None:
    network = replace(NETWORK, address=address)
    (ours, a), (theirs, b) = rank(A, network), rank(B, network)
    dial(b, A, far(a.handle()))
    assert [type(link) for link in (*ours.live, *theirs.live)] == [TcpLink, TcpLink]
    (link,) = ours.live
    b.close()
    eventually(lambda: link.gone and not ours.live, WAIT_S, "the end of the link")


@pytest.mark.parametrize(("network", "why"), [(None, "is on another host"), (OTHER, "has another join secret")])
def test_a_peer_that_cannot_be_reached_is_named_with_what_to_do(rank: Rank, network: Network | None, why: str) -> None:
    (ours, a), (_, b) = rank(A, NETWORK), rank(B, network)
    with pytest.raises(RankDied, match=rf"rank 0 \(incarnation 1\).* {why}") as refused:
        dial(b, A, far(a.handle()))
    assert refused.value.hint
    assert ours.live == ()
