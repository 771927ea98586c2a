"""A rank's way to what ranks of its host have left: the KV pools that its agent keeps. Light: no torch.

The agent's side is `workers/agent/kv_pools.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from membership.base.errors import ConfigError, QueueError
from membership.base.rank_id import RankId
from membership.base.timing import POOL_TIMEOUT_S
from workers.ipc.handover import Handover, ResourceHandle


class Open(msgspec.Struct, frozen=True, array_like=True):
    """Rank to agent: give me the pool of this rank, which has ended. Its descriptor comes along with the answer."""

    rank: int
    incarnation: int


@contextmanager
def opened(handle: bytes, source: RankId) -> Iterator[int]:
    """The pool of a rank that has ended, as a descriptor to read from.

    HandoverRefused: the agent has none, or that rank may still write. QueueClosed, WaitTimeout: it does not answer.
    """
    if not handle:
        raise ConfigError("this rank's parent keeps no KV pools")
    where = msgspec.msgpack.decode(handle, type=ResourceHandle)
    request = msgspec.msgpack.encode(Open(*source))
    link = Handover.default().connect(where.address, where.resource, request, timeout_s=POOL_TIMEOUT_S)
    try:
        if len(link.reply_fds) != 1:
            raise QueueError(f"the pool of {source} came with {len(link.reply_fds)} descriptors")
        yield link.reply_fds[0]
    finally:
        link.close()
