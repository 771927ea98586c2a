"""A link over TCP that was cut is made again by the side that had made it, while both sides want it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from membership.base.errors import CoverageLost, Fenced, PeerTimeout
from membership.base.network import Network
from membership.base.rank_id import RankId
from membership.base.timing import LINK_DIAL_S, LINK_RETRY_MAX_S, LINK_RETRY_S
from membership.store.records import Member, View
from tests.support.exchange_ranks import Experts, batch
from tests.support.helpers import eventually
from tests.support.local_exchange import LocalExchange
from tests.support.watched_doorbell import WatchedDoorbell
from workers.exchange.links import Links
from workers.exchange.loop import Exchange
from workers.exchange.model_side import StepContext
from workers.exchange.tcp import redial
from workers.exchange.tcp.link import TcpLink
from workers.exchange.tcp.redial import Redial
from workers.exchange.tcp.transport import TcpTransport
from workers.protocol.exchange_handle import TcpHandle
from workers.protocol.far_link import FarLink
from workers.queue.data_port import DataPort

pytestmark = pytest.mark.unit

NETWORK = Network("127.0.0.1", "moe", b"a secret of the tests' cluster")
WAIT_S = 30.0
ALL = (0, 1, 2, 3)
PLACEMENT = {0: ((),), 1: (ALL,)}
ACCEPTS, DIALS = RankId(0, 1), RankId(1, 2)
KNOWN = Redial(TcpHandle("tcp://10.0.0.2:7000", b"key"), linked_at=100.0)


class Rank:
    """One side, over TCP."""

    def __init__(self, me: RankId, ends: ExitStack) -> None:
        self.me, self.bell = me, WatchedDoorbell()
        ends.callback(self.bell.close)
        opener = partial(TcpTransport, network=NETWORK)
        self.exchange = Exchange(me, Experts(me.rank, PLACEMENT), self.bell, opener, answer_timeout_s=WAIT_S)
        ends.callback(self.exchange.close)
        view = View(
            epoch=1, members=tuple(Member(rank=r, node="n", incarnation=r + 1) for r in PLACEMENT), placement=PLACEMENT
        )
        self.context = StepContext(view, 7, 1, 1)

    @property
    def links(self) -> Links:
        return self.exchange._links

    def link_with(self, peer: RankId) -> TcpLink | None:
        link = self.links.of(peer)
        assert link is None or isinstance(link, TcpLink)
        return link

    def lose(self, peer: RankId) -> TcpLink:
        """Its side of the link has ended, as if the connection had."""
        transport, link = self.exchange._transport, self.link_with(peer)
        assert isinstance(transport, TcpTransport)
        assert link is not None
        transport._io.call(partial(transport._lost, link, "the test has cut it"))
        return link


@pytest.fixture
def pair() -> Iterator[tuple[Rank, Rank]]:
    with ExitStack() as ends:
        accepts, dials = Rank(ACCEPTS, ends), Rank(DIALS, ends)
        dials.exchange.connect({ACCEPTS: accepts.exchange.handle()}, WAIT_S)
        accepts.exchange.connect({DIALS: dials.exchange.handle()}, WAIT_S)
        for rank in (accepts, dials):
            rank.exchange.begin_step(rank.context)
        yield accepts, dials


def is_new(rank: Rank, peer: RankId, old: TcpLink | None) -> bool:
    link = rank.link_with(peer)
    return link is not None and link is not old


def ask(accepts: Rank, dials: Rank) -> None:
    """Rank 0 has no expert, and asks rank 1: the bits are those of one rank."""
    rows = batch(3, 6, 2, len(ALL), 16, torch.bfloat16)
    accepts.bell.on_wait = lambda: dials.exchange.serve() and None
    found = accepts.exchange.dispatch_combine(0, *rows)
    assert torch.equal(found, LocalExchange(Experts(0, {0: (ALL,)})).dispatch_combine(0, *rows))


@pytest.mark.parametrize("loser", [0, 1], ids=["the side that was dialled", "the side that dialled"])
def test_a_link_that_one_side_has_lost_is_made_again_for_both(pair: tuple[Rank, Rank], loser: int) -> None:
    accepts, dials = pair
    old = accepts.link_with(DIALS), dials.link_with(ACCEPTS)
    pair[loser].lose(pair[1 - loser].me)
    eventually(lambda: is_new(accepts, DIALS, old[0]) and is_new(dials, ACCEPTS, old[1]), WAIT_S, "new links")
    for link in old:
        assert link is not None
        assert link.gone
    accepts.exchange.begin_step(accepts.context)
    ask(accepts, dials)
    assert accepts.exchange.suspects == set()


def test_rows_pass_the_data_connection_and_its_end_is_the_end_of_the_link(
    pair: tuple[Rank, Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepts, dials = pair
    old = accepts.link_with(DIALS), dials.link_with(ACCEPTS)
    for link in old:
        eventually(lambda link=link: link is not None and link.data is not None, WAIT_S, "a data connection")
    over_zeromq: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(
            TcpTransport, "_send", lambda _self, _link, head, _b=(): over_zeromq.append(type(head).__name__)
        )
        ask(accepts, dials)
        large = batch(3, 4096, 2, len(ALL), 1024, torch.bfloat16)  # far more than a socket takes at once
        accepts.bell.on_wait = lambda: dials.exchange.serve() and None
        found = accepts.exchange.dispatch_combine(0, *large)
    assert torch.equal(found, LocalExchange(Experts(0, {0: (ALL,)})).dispatch_combine(0, *large))
    assert over_zeromq == []
    eventually(
        lambda: any(link.sent_bytes > 1 << 20 for peer, link in accepts.links.far.items() if peer == DIALS),
        WAIT_S, "its bytes to be counted",
    )  # fmt: skip
    assert old[0] is not None
    assert old[0].data is not None
    old[0].data._sealed.close()
    accepts.bell.on_wait = lambda: dials.exchange.serve() and None
    accepts.exchange.begin_step(accepts.context)
    with monkeypatch.context() as patched:
        patched.setattr(accepts.exchange, "_answer_timeout_s", 0.1)
        with pytest.raises((CoverageLost, PeerTimeout)):
            accepts.exchange.dispatch_combine(0, *batch(3, 6, 2, len(ALL), 16, torch.bfloat16))
    eventually(lambda: is_new(accepts, DIALS, old[0]) and is_new(dials, ACCEPTS, old[1]), WAIT_S, "new links")
    accepts.exchange.begin_step(accepts.context)
    ask(accepts, dials)


def test_a_peer_that_dies_with_rows_on_their_way_ends_its_link_and_no_other_one(pair: tuple[Rank, Rank]) -> None:
    """As the kernel does it for a process that is killed: a reset, while more is to be sent than the socket takes."""
    accepts, dials = pair
    old = accepts.link_with(DIALS), dials.link_with(ACCEPTS)
    for link in old:
        eventually(lambda link=link: link is not None and link.data is not None, WAIT_S, "a data connection")
    assert old[0] is not None
    assert old[0].data is not None
    assert old[1] is not None
    assert old[1].data is not None
    old[0].data.send(b"rows", [memoryview(bytes(32 << 20))])
    assert old[0].data._sealed._unsent, "it is more than the socket takes"
    old[1].data._sealed.close()
    eventually(lambda: is_new(accepts, DIALS, old[0]) and is_new(dials, ACCEPTS, old[1]), WAIT_S, "new links")
    accepts.exchange.begin_step(accepts.context)
    ask(accepts, dials)


def test_a_link_stays_where_the_data_port_takes_what_nobody_answers(
    pair: tuple[Rank, Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a port forward does, or a mesh: rows go over the link's other connection."""
    accepts, dials = pair
    taken: list[bytes] = []

    def hang_up(_port: DataPort, stranger: socket.socket) -> None:
        taken.append(stranger.recv(100))
        _port._hang_up(stranger)

    monkeypatch.setattr(DataPort, "_greeted", hang_up)
    old = accepts.lose(DIALS), dials.link_with(ACCEPTS)
    eventually(lambda: is_new(accepts, DIALS, old[0]) and is_new(dials, ACCEPTS, old[1]), WAIT_S, "new links")
    links = accepts.link_with(DIALS), dials.link_with(ACCEPTS)
    transport = dials.exchange._transport
    assert isinstance(transport, TcpTransport)
    eventually(lambda: taken and all(each.settled for each in transport._taking_up.values()), WAIT_S, "the attempt")
    accepts.exchange.begin_step(accepts.context)
    ask(accepts, dials)
    assert links == (accepts.link_with(DIALS), dials.link_with(ACCEPTS))
    assert [link.data for link in links if link is not None] == [None, None]


def test_what_links_have_carried_and_suffered_is_counted_over_all_their_connections(pair: tuple[Rank, Rank]) -> None:
    accepts, dials = pair
    ask(accepts, dials)
    eventually(lambda: accepts.links.far.get(DIALS, FarLink()).sent_bytes > 0, WAIT_S, "a report of the first link")
    before = accepts.links.far[DIALS]
    assert (before.up, before.cuts, before.suspects) == (True, 0, 0)
    assert 0 < before.rtt_s < WAIT_S
    old = accepts.lose(DIALS)
    eventually(lambda: is_new(accepts, DIALS, old), WAIT_S, "a new link")
    for rank, peer in ((accepts, DIALS), (dials, ACCEPTS)):
        eventually(lambda r=rank, p=peer: r.links.far[p].cuts == 1 and r.links.far[p].up, WAIT_S, "both to count it")
    assert accepts.links.far[DIALS].sent_bytes >= before.sent_bytes
    dials.exchange.disconnect([ACCEPTS])
    eventually(lambda: not accepts.links.far and not dials.links.far, WAIT_S, "the link to be forgotten")


def test_rows_that_were_on_their_way_are_asked_for_again_over_the_new_link(pair: tuple[Rank, Rank]) -> None:
    """The peer is linked again before the asker has looked: no rank is missing, but the answer will never come."""
    accepts, dials = pair
    rows = batch(3, 6, 2, len(ALL), 16, torch.bfloat16)

    def cut() -> None:
        eventually(lambda: dials.bell.look() or dials.exchange.pending(), WAIT_S, "rows to be asked for")
        old = accepts.lose(DIALS)
        eventually(lambda: is_new(accepts, DIALS, old), WAIT_S, "a new link")
        accepts.bell.on_wait = lambda: dials.exchange.serve() and None

    accepts.bell.on_wait = cut
    found = accepts.exchange.dispatch_combine(0, *rows)
    assert torch.equal(found, LocalExchange(Experts(0, {0: (ALL,)})).dispatch_combine(0, *rows))
    assert accepts.exchange.retried_rows > 0


def test_a_rank_says_which_peers_it_does_not_reach(pair: tuple[Rank, Rank]) -> None:
    """In each step anew, unless they are masked."""
    accepts, dials = pair
    assert accepts.exchange.unlinked() == []
    dials.exchange.close()
    eventually(lambda: not accepts.links.live, WAIT_S, "the end of the link")
    for _ in range(2):
        accepts.exchange.begin_step(accepts.context)
        assert accepts.exchange.unlinked() == [DIALS.rank]
    accepts.exchange.begin_step(replace(accepts.context, masked=1 << DIALS.rank))
    assert accepts.exchange.unlinked() == []


def test_a_link_that_was_given_up_does_not_return(pair: tuple[Rank, Rank]) -> None:
    accepts, dials = pair
    old = accepts.lose(DIALS)
    eventually(lambda: old.gone, WAIT_S, "the cut")
    dials.exchange.disconnect([ACCEPTS])
    accepts.exchange.disconnect([DIALS])
    transport = dials.exchange._transport
    assert isinstance(transport, TcpTransport)
    eventually(lambda: not transport._redials, WAIT_S, "the last attempt to be over")
    eventually(lambda: not accepts.links.live and not dials.links.live, WAIT_S, "no links")


def test_a_view_can_be_prepared_while_a_link_is_cut(pair: tuple[Rank, Rank]) -> None:
    """It returns by itself; no rank waits for it, and none is blamed."""
    _, dials = pair
    link = dials.link_with(ACCEPTS)
    assert link is not None
    dials.links.retire(link, returns=True)
    dials.exchange.connect({ACCEPTS: b"not dialled"}, 0.0)


def test_a_link_that_was_made_again_too_late_is_refused(pair: tuple[Rank, Rank]) -> None:
    accepts, _ = pair
    link = accepts.link_with(DIALS)
    assert link is not None
    accepts.links.retire(link, returns=True)
    accepts.exchange.disconnect([DIALS])
    with pytest.raises(Fenced, match="does not need the link"):
        accepts.links.add(link, again=True)
    assert accepts.links.live == ()


def test_a_newer_incarnation_ends_the_wait_for_an_older_ones_link(pair: tuple[Rank, Rank]) -> None:
    accepts, _ = pair
    link = accepts.link_with(DIALS)
    assert link is not None
    accepts.links.retire(link, returns=True)
    with ExitStack() as ends:
        newer = Rank(RankId(DIALS.rank, 9), ends)
        newer.exchange.connect({ACCEPTS: accepts.exchange.handle()}, WAIT_S)
        assert not accepts.links.returning(DIALS)


def test_pauses_grow_until_a_link_holds() -> None:
    known, now, pauses = KNOWN, 100.5, []
    for _ in range(8):
        known = redial.cut(known, now)
        pauses.append(known.due - now)
        now = known.due
        known = redial.begin(known, now)
        assert known.due == now + LINK_DIAL_S
        now += 0.1
    assert pauses[:3] == pytest.approx([LINK_RETRY_S, 2 * LINK_RETRY_S, 4 * LINK_RETRY_S])
    assert pauses[-1] == pytest.approx(LINK_RETRY_MAX_S)
    known = redial.linked(known, now)
    flapping = redial.cut(known, now + 0.1)
    assert flapping.due - now - 0.1 == pytest.approx(LINK_RETRY_MAX_S)
    held = redial.cut(known, now + LINK_RETRY_MAX_S + 0.1)
    assert held.due - held.linked_at < 2 * LINK_RETRY_MAX_S
    assert held.attempts == 1


def test_data_connections_that_do_not_hold_are_not_asked_for_for_a_while() -> None:
    once = redial.data_ended(KNOWN, 1000.0)
    assert redial.with_data(KNOWN, 1000.0)
    assert redial.with_data(once, 1000.0)
    again = redial.linked(redial.begin(redial.cut(redial.data_ended(once, 1050.0), 1050.0), 1051.0), 1052.0)
    assert not redial.with_data(again, 1052.0)
    assert redial.with_data(again, 1111.0)
    assert redial.with_data(redial.data_ended(again, 1200.0), 1200.0), "one that has held"


@given(st.lists(st.sampled_from(["cut", "begin", "linked"]), max_size=40), st.floats(0.0, 5.0))
def test_a_cut_link_always_has_a_next_attempt_soon(steps: list[str], pause_s: float) -> None:
    known, now = KNOWN, 100.0
    for step in steps:
        now += pause_s
        known = getattr(redial, step)(known, now)
        if step != "linked":
            assert now < known.due <= now + max(LINK_RETRY_MAX_S, LINK_DIAL_S)
