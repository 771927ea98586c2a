"""What an agent tells engines on other hosts, at once and by a queue of its own: a rank of its host has ended."""

from __future__ import annotations

import msgspec

from membership.base.rank_id import RankId


class DeathNotice(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Its agent's kernel says so: the process writes nothing any more."""

    rank: int
    incarnation: int

    @property
    def key(self) -> RankId:
        """Which process."""
        return RankId(self.rank, self.incarnation)
