"""A transport without peers: the exchange computes every row on its own rank."""

from __future__ import annotations

import sys

from membership.base.errors import RankError
from membership.base.rank_id import RankId
from workers.exchange.links import Links


class Loopback:
    """`exchange.link.Transport` that never makes a link."""

    def __init__(self, links: Links) -> None:
        self._me = links.me

    def handle(self) -> bytes:
        """Empty: no peer can reach this rank."""
        return b""

    def dial(self, peer: RankId, handle: bytes, deadline: float) -> None:
        """RankError, always."""
        raise RankError(f"rank {self._me.rank} runs alone and cannot link with rank {peer.rank}")

    def most_pairs(self, row_bytes: int) -> int:
        """No limit."""
        return sys.maxsize

    def close(self) -> None:
        """Nothing is open."""
