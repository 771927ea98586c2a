"""What this rank's links with other hosts have carried and suffered: what the kernel counts for each connection, summed
over the connections that a link has had. Pure, for `transport.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from membership.base.rank_id import RankId
from workers.protocol.far_link import FarLink
from workers.queue.silence import Acks


class Ledger:
    """Of all peers that are linked, or will be again. Ours is the sending half: the peer counts the other one."""

    def __init__(self) -> None:
        self._ended: dict[RankId, FarLink] = {}  # what connections that have ended add

    def suspected(self, peer: RankId) -> None:
        """Its host was silent."""
        known = self._of(peer)
        self._ended[peer] = known._replace(suspects=known.suspects + 1)

    def cut(self, peer: RankId) -> None:
        """The link has ended though both ends lived on."""
        known = self._of(peer)
        self._ended[peer] = known._replace(cuts=known.cuts + 1)

    def closed(self, peer: RankId, acks: Acks | None) -> None:
        """A connection has ended; this was seen of it last."""
        if acks is not None:
            self._ended[peer] = self._with(peer, acks)._replace(up=False)

    def report(self, open_now: Mapping[RankId, Acks | None], returning: Collection[RankId]) -> dict[RankId, FarLink]:
        """All that is known now. Peers that are not linked, and will not be again, are forgotten."""
        self._ended = {peer: known for peer, known in self._ended.items() if peer in open_now or peer in returning}
        found = {peer: self._of(peer) for peer in returning}
        return found | {peer: self._with(peer, acks)._replace(up=True) for peer, acks in open_now.items()}

    def _of(self, peer: RankId) -> FarLink:
        return self._ended.get(peer, FarLink())

    def _with(self, peer: RankId, acks: Acks | None) -> FarLink:
        known = self._of(peer)
        if acks is None:
            return known
        return known._replace(
            rtt_s=acks.rtt_s,
            sent_bytes=known.sent_bytes + acks.sent_bytes,
            retransmits=known.retransmits + acks.retransmits,
        )
