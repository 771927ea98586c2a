"""What is counted of a link with another host, over the connections that it has had."""

from __future__ import annotations

import pytest

from membership.base.rank_id import RankId
from workers.exchange.tcp.ledger import Ledger
from workers.protocol.far_link import FarLink
from workers.queue.silence import Acks

pytestmark = pytest.mark.unit

PEER, OTHER = RankId(2, 7), RankId(3, 8)


def acks(sent_bytes: int, retransmits: int = 0, rtt_s: float = 0.001) -> Acks:
    return Acks(False, 0.0, rtt_s, 0.0, sent_bytes, retransmits)


def test_connections_add_up_and_a_link_that_is_away_stays_known() -> None:
    ledger = Ledger()
    assert ledger.report({PEER: None}, ()) == {PEER: FarLink(up=True)}
    assert ledger.report({PEER: acks(10)}, ()) == {PEER: FarLink(up=True, rtt_s=0.001, sent_bytes=10)}
    ledger.suspected(PEER)
    ledger.cut(PEER)
    ledger.closed(PEER, acks(15, 2))
    away = FarLink(up=False, rtt_s=0.001, sent_bytes=15, retransmits=2, suspects=1, cuts=1)
    assert ledger.report({}, {PEER}) == {PEER: away}
    assert ledger.report({PEER: acks(4, 1, 0.002)}, ()) == {
        PEER: away._replace(up=True, sent_bytes=19, retransmits=3, rtt_s=0.002)
    }


def test_an_attempt_that_fails_is_no_cut_and_a_peer_that_is_gone_is_forgotten() -> None:
    ledger = Ledger()
    ledger.closed(PEER, None)
    assert ledger.report({}, {PEER}) == {PEER: FarLink()}
    ledger.closed(OTHER, acks(5))
    assert ledger.report({}, ()) == {}
    assert ledger.report({OTHER: acks(1)}, ())[OTHER].sent_bytes == 1, "another link with the same process"
