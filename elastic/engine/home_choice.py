"""Which rank is the best home for one more request. Pure."""

from __future__ import annotations

from elastic.engine.kv_blocks import blocks_for
from elastic.engine.prefix import crowding
from elastic.engine.sequence import Home, Sequence


def unwelcome(home: Home, sequence: Sequence, cached_tokens: int, on_host: int) -> tuple[int, ...]:
    """Sorts the best home for one more request first. `on_host`: requests of all ranks of its host."""
    running = len(home.running)
    if home.fills_host:  # the more it has of them, the fewer experts are read twice
        beside = -running if _to_the_end(home, sequence) else 1
        return crowding(on_host, cached_tokens), beside, home.pool.used, home.rank
    return crowding(running, cached_tokens), 0, home.pool.used, home.rank


def _to_the_end(home: Home, sequence: Sequence) -> bool:
    """Whether its blocks suffice for one more request until all have ended, however long they get: none is put off."""
    size = home.pool.block_size
    all_of_them = (len(each.request.prompt) + each.request.max_tokens for each in (*home.running, sequence))
    return sum(blocks_for(tokens, size) for tokens in all_of_them) <= home.pool.size
