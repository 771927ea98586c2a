"""Names for what full KV blocks hold, so that a request that begins like an earlier one computes only the rest. Pure.

A name is a digest over everything that the block's bits depend on: what is served and how it computes, and every token
up to the block's last one. In invariant mode the cached bits are those that the request would compute: a token's keys
and values depend neither on its batch nor on how its prompt was cut (docs/GUARANTEES.md, G3).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import msgspec

from membership.store.records import ClusterConfig

WORTH_TOKENS = 64  # cached tokens that outweigh one more request on a rank
MOST_WORTH = 4  # such requests


class Contents:
    """Names blocks of one model. Without `config.prefix_cache` it names none, so none is found."""

    def __init__(self, config: ClusterConfig, model: str) -> None:
        """`model`: the name of what is served by content (`identity.name_of`)."""
        self._size = config.block_size
        self._on = config.prefix_cache
        computes = [config.model, model, config.dtype, config.exactness, config.device, config.block_size]
        self._root = hashlib.blake2b(msgspec.json.encode(computes), digest_size=32).digest()

    def extend(self, names: list[bytes], tokens: Sequence[int]) -> list[bytes]:
        """Add what is missing to the names of these tokens' full blocks, in place; return them."""
        if self._on and len(tokens) >= (len(names) + 1) * self._size:
            for start in range(len(names) * self._size, len(tokens) - self._size + 1, self._size):
                before = names[-1] if names else self._root
                inside = array("q", tokens[start : start + self._size]).tobytes()
                names.append(hashlib.blake2b(before + inside, digest_size=32).digest())
        return names


def crowding(running: int, cached_tokens: int) -> int:
    """How unwelcome one more request is on a rank with `running` requests that has `cached_tokens` of it.

    What is cached draws a request to a rank, but not away from one that has much less to do.
    """
    return running * WORTH_TOKENS - min(cached_tokens, MOST_WORTH * WORTH_TOKENS)
