"""Ranks of which some listen with the join secret before and some with the next one: each links with each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from membership.base.errors import RankDied
from membership.base.network import Network
from membership.base.rank_id import RankId
from tests.support.helpers import eventually
from workers.exchange.links import Links
from workers.exchange.tcp.transport import TcpTransport
from workers.ipc.doorbell import Doorbell

pytestmark = pytest.mark.integration

WAIT_S = 30.0
OLD, NEW = b"the first secret of the tests", b"the second secret of the tests"


class Side:
    """One rank, in a thread of its transport."""

    def __init__(self, slot: int, network: Network, ends: ExitStack) -> None:
        bell = Doorbell()
        ends.callback(bell.close)
        self.me = RankId(slot, slot + 1)
        self.links = Links(self.me, bell)
        self.transport = TcpTransport(self.links, network)
        ends.callback(self.links.close)
        ends.callback(self.transport.close)

    def dial(self, other: Side) -> None:
        self.transport.dial(other.me, other.transport.handle(), time.monotonic() + WAIT_S)


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as ends:
        yield ends


def linked(one: Side, other: Side) -> None:
    eventually(lambda: one.links.of(other.me) and other.links.of(one.me), WAIT_S, "the link on both sides")


def test_ranks_of_both_generations_link_whichever_dials(tmp_path: Path, ends: ExitStack) -> None:
    """One of them was started before its host got the new secret, and reads the file again."""
    file = tmp_path / "secrets"
    file.write_bytes(OLD)
    early = Side(0, Network("127.0.0.1", "moe", OLD, file=file), ends)
    file.write_bytes(OLD + b"\n" + NEW)
    late = Side(1, Network("127.0.0.1", "moe", NEW, others=(OLD,), file=file), ends)
    early.dial(late)
    linked(early, late)
    third = Side(2, Network("127.0.0.1", "moe", NEW, others=(OLD,), file=file), ends)
    third.dial(early)
    linked(third, early)
    third.dial(late)
    linked(third, late)


@pytest.mark.parametrize("dials", ["the one that lacks it", "the one that has both"])
def test_one_that_lacks_the_new_secret_is_refused_and_it_is_said_why(ends: ExitStack, dials: str) -> None:
    has = Network("127.0.0.1", "moe", NEW, others=(OLD,))
    lacks, newer = Side(0, replace(has, secret=OLD, others=()), ends), Side(1, has, ends)
    one, other = (lacks, newer) if dials == "the one that lacks it" else (newer, lacks)
    with pytest.raises(RankDied, match="another join secret"):
        one.dial(other)
    assert (one.links.live, other.links.live) == ((), ())
