"""The KV cache of one rank as the engine accounts for it: a pool of fixed-size blocks, some of known content.

The engine alone hands blocks out, so that a rank never allocates and a repeated chunk writes the same cells. A block is
free, used by one or more requests, or idle: no request uses it, but its content may be asked for again. Content is what
a rank has confirmed, block by block (`prefix.py` names it); a block of known content is never written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from membership.base.errors import ElasticError
from workers.protocol.messages import Known


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks hold `tokens` tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """Blocks of one rank. Free ones are taken first, the last freed before others: their memory is the warmest.

    Then idle ones, the least recently used before others.
    """

    def __init__(self, size: int, block_size: int) -> None:
        """`size` blocks of `block_size` tokens each."""
        self.size, self.block_size = size, block_size
        self._free = list(range(size - 1, -1, -1))
        self._idle: dict[int, None] = {}  # in order of use
        self._users = [0] * size
        self._content: dict[int, bytes] = {}  # block -> what it holds
        self._holder: dict[bytes, int] = {}  # and back
        self._news: Known = dict.fromkeys(range(size), b"")  # what the rank has not received

    def restore(self, known: Known) -> None:
        """Nothing is used yet, and the rank, which served an engine before, says what its blocks hold."""
        for block, content in known.items():
            if 0 <= block < self.size and content not in self._holder:
                self._content[block], self._holder[content] = content, block
                self._idle[block] = None
                self._news.pop(block, None)
        self._free = [block for block in self._free if block not in self._content]

    def news(self) -> Known:
        """What has become of the blocks' content since the last call; the rank keeps it for the next engine."""
        news, self._news = self._news, {}
        return news

    @property
    def free(self) -> int:
        """How many blocks can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """How many blocks requests use."""
        return self.size - self.free

    def find(self, contents: Iterable[bytes]) -> list[int]:
        """The blocks that hold the first of these contents, up to the first one that is not there."""
        found = []
        for content in contents:
            block = self._holder.get(content)
            if block is None:
                break
            found.append(block)
        return found

    def cost(self, count: int, shared: Sequence[int]) -> int:
        """By how many blocks `free` shrinks for a request of `count` blocks that begins with `shared`."""
        return count - sum(self._users[block] > 0 for block in shared)

    def take(self, count: int, shared: Sequence[int] = ()) -> list[int]:
        """`count` blocks for one more user, `shared` first. The caller has made sure that there are enough."""
        if (missing := self.cost(count, shared)) > self.free:
            raise ElasticError(f"asked for {missing} KV blocks of which {self.free} are free")
        for block in shared:
            self._idle.pop(block, None)
            self._users[block] += 1
        return [*shared, *(self._take_one() for _ in range(count - len(shared)))]

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            del self._holder[self._content.pop(block)]
            self._news[block] = b""
        self._users[block] = 1
        return block

    def keep(self, block: int, content: bytes) -> None:
        """A used block holds this from now on. Where another one does already, that one stays the one to be found."""
        if block not in self._content and content not in self._holder:
            self._content[block], self._holder[content] = content, block
            self._news[block] = content

    def give_back(self, blocks: list[int]) -> None:
        """One user less. Empties the list, so that its owner cannot use or return them again.

        The last block counts as used before the first: without the first it cannot be found.
        """
        for block in reversed(blocks):
            if self._users[block] < 1:
                raise ElasticError(f"KV block {block} was returned twice")
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._content:
                self._idle[block] = None
            else:
                self._free.append(block)
        blocks.clear()
