"""What a node's ranks, or the engine, know of their links with other nodes, together: one `HostLink` per node. Pure.

Ranks come and go, and what they counted stays: a counter that an operator reads never falls while the agent lives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from membership.base.rank_id import RankId
from membership.store.records import HostLink
from workers.protocol.far_link import FarLink


@dataclass
class HostLinks:
    """Fed by reports of each rank, or of the engine."""

    _reports: dict[RankId, dict[RankId, FarLink]] = field(default_factory=dict)
    _counted: dict[str, HostLink] = field(default_factory=dict)  # node -> what was counted so far
    _nodes: dict[RankId, str] = field(default_factory=dict)  # of peers; a record may be away for a moment

    def reported(self, rank: RankId, links: Mapping[RankId, FarLink], node_of: Mapping[RankId, str]) -> None:
        """A rank's newest report. `node_of`: of ranks of other nodes; a peer that no node ever had is left out."""
        before = self._reports.get(rank, {})
        self._nodes |= {peer: node_of[peer] for peer in links if peer in node_of}
        known = {peer: link for peer, link in links.items() if peer in self._nodes}
        for peer, link in known.items():
            node, last = self._nodes[peer], before.get(peer, FarLink())
            so_far = self._counted.get(node, HostLink())
            self._counted[node] = replace(
                so_far,
                sent_bytes=so_far.sent_bytes + max(0, link.sent_bytes - last.sent_bytes),
                retransmits=so_far.retransmits + max(0, link.retransmits - last.retransmits),
                suspects=so_far.suspects + max(0, link.suspects - last.suspects),
                cuts=so_far.cuts + max(0, link.cuts - last.cuts),
            )
        self._reports[rank] = known

    def suspected(self, peer: RankId) -> None:
        """A link of which no report says so any more, since it is not used again."""
        if (node := self._nodes.get(peer)) is not None:
            so_far = self._counted[node]
            self._counted[node] = replace(so_far, suspects=so_far.suspects + 1)

    def keep(self, ranks: Collection[RankId]) -> None:
        """Only these have not ended."""
        self._reports = {rank: report for rank, report in self._reports.items() if rank in ranks}
        linked = {peer for report in self._reports.values() for peer in report}
        self._nodes = {peer: node for peer, node in self._nodes.items() if peer in linked}

    def record(self) -> dict[str, HostLink]:
        """By node, as it is now."""
        found = dict(self._counted)
        now: dict[str, list[FarLink]] = {}
        for report in self._reports.values():
            for peer, link in report.items():
                now.setdefault(self._nodes[peer], []).append(link)
        for node, links in now.items():
            rtt_s = max(link.rtt_s for link in links)
            found[node] = replace(found[node], links=len(links), up=sum(link.up for link in links), rtt_s=rtt_s)
        return found
