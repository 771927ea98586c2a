"""Links between ranks of two hosts in network namespaces: a cut ends the link on both sides, and it returns."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from chaos.faults.cuts import CUTS
from chaos.faults.netns import Host, Network
from membership.base import network
from membership.base.rank_id import RankId
from tests.support.helpers import eventually
from tests.support.hosts import own_namespaces
from workers.exchange.links import Links
from workers.exchange.tcp.transport import TcpTransport
from workers.ipc.doorbell import Doorbell

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces take root"),
]

WAIT_S = 30.0
ACCEPTS, DIALS = RankId(0, 1), RankId(1, 2)


class Side:
    """The links of one rank, on its host."""

    def __init__(self, me: RankId, host: Host, ends: ExitStack) -> None:
        bell = Doorbell()
        ends.callback(bell.close)
        self.links = Links(me, bell)
        keys = network.Network(host.address, "moe", b"a secret of the tests' cluster")
        self.transport = host.run(lambda: TcpTransport(self.links, keys))
        ends.callback(self.links.close)
        ends.callback(self.transport.close)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    with Network(["a", "b"]) as made:
        yield made
    assert own_namespaces() == set()


@pytest.fixture
def sides(hosts: Network) -> Iterator[tuple[Side, Side]]:
    with ExitStack() as ends:
        accepts, dials = Side(ACCEPTS, hosts["a"], ends), Side(DIALS, hosts["b"], ends)
        dials.transport.dial(ACCEPTS, accepts.transport.handle(), time.monotonic() + WAIT_S)
        yield accepts, dials


@pytest.mark.parametrize("fault", CUTS)
def test_a_cut_ends_the_link_on_both_sides_and_it_returns(hosts: Network, sides: tuple[Side, Side], fault: str) -> None:
    """One way or both, by silence or by a reset."""
    accepts, dials = sides
    (ours,), (theirs,) = accepts.links.live, dials.links.live
    injector = CUTS[fault][1](hosts["a"], [hosts["b"]])
    try:
        injector.inject()
        eventually(lambda: ours.gone and theirs.gone, WAIT_S, "both sides to see it")
        assert (accepts.links.live, dials.links.live) == ((), ())
    finally:
        injector.heal()
    eventually(lambda: accepts.links.of(DIALS) and dials.links.of(ACCEPTS), WAIT_S, "the link")
    assert not accepts.links.returning(DIALS)
