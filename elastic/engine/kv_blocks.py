"""The KV cache of one rank as the engine accounts for it: a pool of fixed-size blocks.

The engine alone hands blocks out, so that a rank never allocates and a repeated chunk writes the same cells.
"""

from __future__ import annotations

from membership.base.errors import ElasticError


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks hold `tokens` tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """Free blocks of one rank. Blocks freed last are used first: their memory is the warmest."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many blocks are taken."""
        return self.size - len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has made sure that there are enough."""
        if count > len(self._free):
            raise ElasticError(f"asked for {count} KV blocks of which {len(self._free)} are free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks and empty the list, so that its owner cannot use or return them again."""
        self._free.extend(reversed(blocks))
        blocks.clear()
        if len(self._free) > self.size:
            raise ElasticError("KV blocks were returned twice")
