"""Links between ranks of one process: each belongs to one pair of incarnations, and the newest one wins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial

import pytest

from membership.base.errors import ElasticError
from membership.base.rank_id import RankId
from tests.support.exchange_ranks import Experts
from tests.support.helpers import eventually
from workers.exchange.loop import Exchange
from workers.exchange.shm.transport import ShmTransport
from workers.ipc.doorbell import Doorbell

pytestmark = pytest.mark.unit

WITHIN_S, REFUSED_WITHIN_S = 5.0, 0.5
Make = Callable[[int, int], Exchange]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes a rank's end of its links, given rank and incarnation."""
    with ExitStack() as ends:

        def exchange(rank: int, incarnation: int) -> Exchange:
            bell = Doorbell()
            ends.callback(bell.close)
            made = Exchange(RankId(rank, incarnation), Experts(rank, {}), bell, partial(ShmTransport, area=1 << 16))
            ends.callback(made.close)
            return made

        yield exchange


def test_a_peer_that_means_another_incarnation_is_not_linked(make: Make) -> None:
    here, peer = make(0, 5), make(2, 7)
    with pytest.raises(ElasticError):
        peer.connect({RankId(0, 4): here.handle()}, REFUSED_WITHIN_S)
    peer.connect({RankId(0, 5): here.handle()}, WITHIN_S)
    assert len(here.inbox(RankId(2, 7))) > 0


def test_an_older_incarnation_does_not_replace_a_newer_one(make: Make) -> None:
    here, newer, older = make(0, 5), make(1, 9), make(1, 8)
    newer.connect({RankId(0, 5): here.handle()}, WITHIN_S)
    with pytest.raises(ElasticError):
        older.connect({RankId(0, 5): here.handle()}, REFUSED_WITHIN_S)
    assert len(here.inbox(RankId(1, 9))) > 0


class CountingDoorbell(Doorbell):
    """Counts its rings."""

    rings = 0

    def ring(self) -> None:
        self.rings += 1
        super().ring()


def test_the_end_of_a_link_rings_the_doorbell(make: Make) -> None:
    """So a rank that waits for an answer wakes, and asks a replica."""
    transport = partial(ShmTransport, area=1 << 16)
    with closing(CountingDoorbell()) as bell, closing(Exchange(RankId(0, 5), Experts(0, {}), bell, transport)) as here:
        peer = make(1, 9)
        peer.connect({RankId(0, 5): here.handle()}, WITHIN_S)
        before = bell.rings
        peer.close()
        eventually(lambda: bell.rings > before, 2 * WITHIN_S, "a ring")
