"""What ranks of different hosts say to each other: a head of fixed schema (msgpack), then raw buffers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from membership.base.errors import RankError
from workers.exchange.link import Request, Tag
from workers.exchange.router import Parcel
from workers.exchange.rows import DTYPES, Rows
from workers.protocol.exchange_handle import TcpHandle
from workers.queue.handle import Offer

BULK = 8 << 20  # bytes of one Bulk at most, as over shared memory
PIECE = 64 << 10  # of them in a frame: each that arrives shows a slow link's other end that we live


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """First message of the side that dials: `Links.hello`, and where the other side connects to in turn."""

    hello: bytes
    handle: TcpHandle
    attempt: int = 0  # of that side; the Welcome has it, too
    data: bool = False  # it takes up an offer


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """First message of the side that was dialled, over its own connection."""

    hello: bytes
    attempt: int = 0
    offer: Offer | None = None  # of a data connection, for requests and answers


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Back over the connection on which a peer sends: it is not welcome, or its link has ended on this side."""

    reason: str


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Head of a request; `row_of` and the rows follow."""

    tag: Tag
    incarnation: int
    experts: list[int]
    counts: list[int]
    hidden: int
    dtype: int


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Head of an answer; its rows follow, unless it is `refused`."""

    tag: Tag
    incarnation: int
    refused: bool = False
    experts: list[int] = []
    reason: str = ""


class Bulk(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Data of no step (KV blocks); its pieces follow."""

    number: int


class BulkTaken(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """This Bulk has arrived, and can be read."""

    number: int


class Bye(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The sender has hung up."""


Message = Hello | Welcome | Refused | Ask | Answer | Bulk | BulkTaken | Bye


def ask_frames(tag: Tag, incarnation: int, parcel: Parcel, rows: Rows, dtype: int) -> tuple[Ask, list[memoryview]]:
    """A request for `rows[parcel.rows]`. What it sends is a copy."""
    head = Ask(tag, incarnation, parcel.experts, parcel.counts, rows.shape[1], dtype)
    return head, [_raw(parcel.row_of.astype(np.int64)), _raw(rows.take(parcel.rows, 0, mode="clip"))]


def request_of(head: Ask, buffers: Sequence[bytes | memoryview]) -> Request:
    """A request as it arrived. RankError if its parts do not fit together."""
    if len(buffers) != 2 or not 0 <= head.dtype < len(DTYPES) or head.hidden <= 0:
        raise RankError(f"malformed request {head}")
    kind = np.dtype(DTYPES[head.dtype][1])
    row_of, data = buffers
    count, rest = divmod(len(data), head.hidden * kind.itemsize)
    pairs = np.frombuffer(row_of, np.int64) if len(row_of) % 8 == 0 else np.empty(0, np.int64)
    whole = rest == 0 and len(pairs) == sum(head.counts) and len(head.counts) == len(head.experts)
    if not whole or (len(pairs) and not 0 <= pairs.min() <= pairs.max() < count):
        raise RankError(f"malformed request {head} with {len(pairs)} pairs and {len(data)} bytes of rows")
    rows = np.frombuffer(data, kind).reshape(count, head.hidden)
    return Request(head.tag, head.experts, head.counts, pairs.copy(), rows, head.dtype)


def bulk_pieces(data: memoryview) -> list[memoryview]:
    """As they are sent."""
    return [data[at : at + PIECE] for at in range(0, len(data), PIECE)]


def raw_rows(rows: Rows) -> memoryview:
    """The rows of an answer, as they are sent."""
    return _raw(rows)


def _raw(array: Rows) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
