"""A rank's way to what ranks of its host have left: the KV pools that its agent keeps. Light: no torch.

A rank on a CPU fills the memfd that it was forked with. One on a GPU makes memory there, and gives the agent its
descriptor instead (`keep`). The agent's side is `workers/agent/kv_pools.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from membership.base.errors import ConfigError, QueueError
from membership.base.rank_id import RankId
from membership.base.timing import KEEP_TIMEOUT_S, POOL_TIMEOUT_S
from workers.ipc.handover import Handover, Link, ResourceHandle


class Open(msgspec.Struct, frozen=True, array_like=True):
    """Rank to agent: give me the pool of this rank, which has ended. Its descriptor comes along with the answer.

    With a descriptor: it is mine, of memory on a GPU; keep it instead of the memfd.
    """

    rank: int  # NO_SLOT: a spare
    incarnation: int  # or a spare's number
    nbytes: int = 0  # of the descriptor that comes along


class Given(msgspec.Struct, frozen=True, array_like=True):
    """Agent to rank, with the pool's descriptor."""

    nbytes: int = 0  # of memory on a GPU; 0: it is a memfd


class LeftPool(NamedTuple):
    """A descriptor of what a rank has left."""

    fd: int
    nbytes: int  # as in `Given`


@contextmanager
def opened(handle: bytes, source: RankId) -> Iterator[LeftPool]:
    """The pool of a rank that has ended, to read from.

    HandoverRefused: the agent has none, or that rank may still write. QueueClosed, WaitTimeout: it does not answer.
    """
    link = _ask(handle, Open(*source))
    try:
        if len(link.reply_fds) != 1:
            raise QueueError(f"the pool of {source} came with {len(link.reply_fds)} descriptors")
        yield LeftPool(link.reply_fds[0], msgspec.msgpack.decode(link.reply, type=Given).nbytes)
    finally:
        link.close()


def keep(handle: bytes, rank: int, incarnation: int, fd: int, nbytes: int) -> None:
    """Have the agent keep this memory on a GPU as our pool; the descriptor stays the caller's. Errors as `opened`'s."""
    _ask(handle, Open(rank, incarnation, nbytes), [fd], KEEP_TIMEOUT_S).close()


def _ask(handle: bytes, asked: Open, fds: Sequence[int] = (), timeout_s: float = POOL_TIMEOUT_S) -> Link:
    if not handle:
        raise ConfigError("this rank's parent keeps no KV pools")
    where = msgspec.msgpack.decode(handle, type=ResourceHandle)
    request = msgspec.msgpack.encode(asked)
    return Handover.default().connect(where.address, where.resource, request, fds, timeout_s=timeout_s)
