"""The links of a node's ranks with other nodes, summed up: counters never fall, whatever ranks come and go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membership.base.rank_id import RankId
from membership.store.records import HostLink
from workers.protocol.far_link import FarLink
from workers.protocol.host_links import HostLinks

pytestmark = pytest.mark.unit

OURS, ALSO_OURS = RankId(0, 1), RankId(1, 2)
THERE, ALSO_THERE, ELSEWHERE = RankId(2, 3), RankId(3, 4), RankId(4, 5)
NODES = {THERE: "b", ALSO_THERE: "b", ELSEWHERE: "c"}


def test_links_are_summed_by_the_node_that_they_lead_to() -> None:
    links = HostLinks()
    links.reported(OURS, {THERE: FarLink(True, 0.001, 10, 1), ALSO_THERE: FarLink(False, 0.004, 5, 0, 1, 2)}, NODES)
    links.reported(ALSO_OURS, {THERE: FarLink(True, 0.002, 7), ELSEWHERE: FarLink(True, 0.009, 1)}, NODES)
    assert links.record() == {
        "b": HostLink(links=3, up=2, rtt_s=0.004, sent_bytes=22, retransmits=1, suspects=1, cuts=2),
        "c": HostLink(links=1, up=1, rtt_s=0.009, sent_bytes=1),
    }


def test_what_a_rank_that_has_ended_counted_stays() -> None:
    links = HostLinks()
    links.reported(OURS, {THERE: FarLink(True, 0.001, 10, 1)}, NODES)
    links.keep([])
    assert links.record() == {"b": HostLink(sent_bytes=10, retransmits=1)}
    links.reported(RankId(0, 9), {THERE: FarLink(True, 0.001, 2)}, NODES)
    assert links.record()["b"].sent_bytes == 12


def test_a_peer_whose_record_is_away_for_a_moment_is_not_counted_twice() -> None:
    links = HostLinks()
    links.reported(OURS, {THERE: FarLink(True, 0.001, 10)}, {})
    assert links.record() == {}, "nobody knows where it is"
    for nodes in (NODES, {}, NODES):
        links.reported(OURS, {THERE: FarLink(True, 0.001, 10)}, nodes)
    assert links.record()["b"].sent_bytes == 10


def test_a_silent_host_that_no_report_mentions_again_is_counted() -> None:
    """An engine leaves a silent rank's queue."""
    links = HostLinks()
    links.suspected(THERE)
    links.reported(OURS, {THERE: FarLink(True, 0.001, 10)}, NODES)
    links.suspected(THERE)
    links.reported(OURS, {}, NODES)
    assert links.record() == {"b": HostLink(sent_bytes=10, suspects=1)}


@given(st.lists(st.tuples(st.sampled_from([OURS, ALSO_OURS]), st.integers(0, 100), st.booleans()), max_size=30))
def test_counters_never_fall(reports: list[tuple[RankId, int, bool]]) -> None:
    links, before = HostLinks(), 0
    for rank, sent_bytes, alone in reports:
        if alone:
            links.keep([rank])
        links.reported(rank, {THERE: FarLink(True, 0.001, sent_bytes)}, NODES)
        assert links.record()["b"].sent_bytes >= before
        before = links.record()["b"].sent_bytes
