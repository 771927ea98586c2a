"""Places of a rank that are kept for short requests, so that they do not wait until long ones have ended. Pure.

Short is what needs no more than an even share of the KV cache, prompt and output together. While the request whose turn
it is does not fit, short ones may have a reserved place: they are the rank's guests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from elastic.engine.kv_blocks import blocks_for
from elastic.engine.sequence import Home, Sequence
from membership.store.records import ClusterConfig

PART = 8  # one place of so many is reserved


@dataclass(frozen=True)
class Reserve:
    """Of each rank."""

    config: ClusterConfig

    @property
    def places(self) -> int:
        """How many are reserved; none where the KV cache is too small for an even share."""
        return self.config.max_seqs // PART if self.share else 0

    @property
    def share(self) -> int:
        """Blocks of one of them."""
        return self.config.kv_blocks // self.config.max_seqs

    def guests(self, waiting: Iterable[Sequence], oldest: Sequence) -> list[Sequence]:
        """Which ones may go before the oldest that waits; none unless it fits later, whatever guests there are."""
        config = self.config
        if blocks_for(len(oldest.tokens), config.block_size) > config.kv_blocks - self.places * (self.share + 1):
            return []
        most = self.share * config.block_size
        return [each for each in waiting if len(each.request.prompt) + each.request.max_tokens <= most]

    def unused(self, home: Home) -> int:
        """Reserved places of a rank that no guest has."""
        return max(self.places - sum(sequence.guest for sequence in home.running), 0)

    def fits(self, home: Home, blocks: int, arriving: int, *, guest: bool) -> bool:
        """Whether there is a place with as many blocks, and one spare for each sequence there."""
        kept = 0 if guest or not home.running else self.unused(home)
        taken = len(home.running) + arriving + kept
        room = blocks + len(home.running) + kept * self.share <= home.pool.free
        return taken < self.config.max_seqs and room and not (guest and not self.unused(home))

    def kept(self, home: Home, sequence: Sequence) -> int:
        """Free blocks that it must leave to guests to come, as long as another request can give way instead."""
        alone = all(each.guest or each is sequence for each in home.running)
        return 0 if sequence.guest or alone else self.unused(home) * self.share
