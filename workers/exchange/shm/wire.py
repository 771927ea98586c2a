"""The layout of a lane: the memory in which one rank writes its requests and answers to one other rank.

Only the writer's process stores into a lane, and a lane belongs to one pair of incarnations. A sequence number is
published last, so a reader sees a message whole or not at all. At most one request is open per lane: a newer one
replaces it, and an answer counts only if it echoes the whole tag of the request that is open now.
"""

from __future__ import annotations

import struct

import msgspec
import numpy as np

from workers.exchange.link import Refusal, Reply, Request, Tag
from workers.exchange.router import Parcel
from workers.exchange.rows import DTYPES, Rows
from workers.ipc.fence import fence
from workers.ipc.shared_memory import PAGE, Segment, SegmentError

AREA = 32 << 20  # bytes for the rows of one request, and of one answer; memory is taken as it is first used
BULK = 8 << 20  # bytes for data of no step (`model/kv_transfer.py`): the most that is copied at once
MAX_PAIRS = 1 << 15
_INDEX = 3 * 8 * MAX_PAIRS
ASK, ANSWER = 0, 8  # published sequence numbers, in words; each in its own cache line
ASK_AT, ANSWER_AT = 128, 256  # headers, in bytes
_ASK_HEADER = struct.Struct("<12q")
_ANSWER_HEADER = struct.Struct("<9q")


def lane_bytes(area: int = AREA) -> int:
    """Size of a lane's segment."""
    return PAGE + _INDEX + 2 * area + BULK


def most_pairs(area: int, row_bytes: int) -> int:
    """How many pairs one request may have, so that its rows and its answer fit."""
    return max(1, min(area // row_bytes, MAX_PAIRS))


class Lane:
    """One direction between two ranks, seen by its writer or by its reader.

    `words[ASK]` is the sequence number of the newest request (0: none, or it is being written); `words[ANSWER]` that
    of the newest answer.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._map = memoryview(segment.map)
        self.words = self._map[:PAGE].cast("Q")
        index = np.frombuffer(self._map, np.int64, 3 * MAX_PAIRS, PAGE).reshape(3, MAX_PAIRS)
        self._row_of, self._experts, self._counts = index
        self.area = (segment.size - PAGE - _INDEX - BULK) // 2 // PAGE * PAGE
        self._ask_at = PAGE + _INDEX
        self._answer_at = self._ask_at + self.area
        self._bulk_at = segment.size - BULK
        self._rows: dict[tuple[int, int, int], Rows] = {}
        self._reserved = {self._ask_at: 0, self._answer_at: 0, self._bulk_at: 0}

    def close(self) -> None:
        """Release the memory; it is unmapped when the last view of it is gone."""
        self._rows.clear()
        del self._row_of, self._experts, self._counts, self.words, self._map
        self._segment.close()

    def _view(self, at: int, hidden: int, dtype: int) -> Rows:
        """All rows that fit in the area at `at`, as [capacity, hidden]."""
        rows = self._rows.get((at, hidden, dtype))
        if rows is None:
            kind = np.dtype(DTYPES[dtype][1])
            capacity = self.area // (hidden * kind.itemsize)
            rows = np.frombuffer(self._map, kind, capacity * hidden, at).reshape(capacity, hidden)
            self._rows[at, hidden, dtype] = rows
        return rows

    def _room(self, at: int, count: int, hidden: int, dtype: int) -> Rows:
        """The first `count` rows of an area of ours, backed by memory (SegmentError if there is none)."""
        rows = self._view(at, hidden, dtype)[:count]
        if len(rows) < count:
            raise SegmentError(f"{count} rows of {hidden} do not fit in a lane of {self.area} bytes")
        self._reserve(at, rows.nbytes, self.area)
        return rows

    def _reserve(self, at: int, nbytes: int, most: int) -> None:
        if nbytes > self._reserved[at]:
            self._reserved[at] = min(-(-nbytes // (1 << 20)) << 20, most)
            self._segment.reserve(at, self._reserved[at])

    # -- bulk --------------------------------------------------------------------------------------------------------

    def room_for_bulk(self, nbytes: int) -> memoryview[int]:
        """Writer: memory for `nbytes`, or for as many as fit. The reader learns by other means when it may read."""
        nbytes = min(nbytes, BULK)
        self._reserve(self._bulk_at, nbytes, BULK)
        return self._map[self._bulk_at : self._bulk_at + nbytes]

    def bulk(self) -> memoryview[int]:
        """Reader: what was written there last."""
        return self._map[self._bulk_at :]

    # -- requests ----------------------------------------------------------------------------------------------------

    def ask(self, tag: Tag, incarnation: int, parcel: Parcel, rows: Rows, dtype: int) -> None:
        """Writer: open a request in place of any earlier one, whose number is taken away first."""
        self.words[ASK] = 0
        fence()
        count, pairs, experts, hidden = len(parcel.rows), len(parcel.pairs), len(parcel.experts), rows.shape[1]
        rows.take(parcel.rows, 0, self._room(self._ask_at, count, hidden, dtype), "clip")
        self._row_of[:pairs] = parcel.row_of
        self._experts[:experts] = parcel.experts
        self._counts[:experts] = parcel.counts
        _ASK_HEADER.pack_into(self._map, ASK_AT, *tag, incarnation, count, pairs, experts, hidden, dtype)
        fence()
        self.words[ASK] = tag.sequence

    def request(self, sequence: int, incarnation: int) -> Request | None:
        """Reader: the request of this number, or None if it is being replaced or is not from `incarnation`."""
        fence()
        *tag, sender, count, pairs, experts, hidden, dtype = _ASK_HEADER.unpack_from(self._map, ASK_AT)
        row_of = self._row_of[:pairs].copy()
        wanted, counts = self._experts[:experts].tolist(), self._counts[:experts].tolist()
        rows = self._view(self._ask_at, hidden, dtype)[:count]
        found = Request(Tag(*tag), wanted, counts, row_of, rows, dtype)
        fence()
        return found if self.words[ASK] == sequence == tag[0] and sender == incarnation else None

    # -- answers -----------------------------------------------------------------------------------------------------

    def room_for_answer(self, request: Request) -> Rows:
        """Writer: where the rows of an answer belong, one per pair."""
        return self._room(self._answer_at, len(request.row_of), request.rows.shape[1], request.dtype)

    def answer(self, tag: Tag, incarnation: int, refusal: Refusal | None = None) -> None:
        """Writer: publish the rows written, or a refusal."""
        size = 0
        if refusal is not None:
            text = msgspec.msgpack.encode((refusal.experts, refusal.reason[:4000]))
            size = len(text)
            self._room(self._answer_at, -(-size // 4), 1, 0)
            self._map[self._answer_at : self._answer_at + size] = text
        _ANSWER_HEADER.pack_into(self._map, ANSWER_AT, *tag, incarnation, refusal is not None, size)
        fence()
        self.words[ANSWER] = tag.sequence

    def reply(self) -> Reply:
        """Reader: the head of the newest answer."""
        fence()
        *tag, sender, refused, _ = _ANSWER_HEADER.unpack_from(self._map, ANSWER_AT)
        return Reply(tuple(tag), sender, bool(refused))

    def refusal(self) -> Refusal:
        """Reader: the body of the newest answer, which is a refusal."""
        size = _ANSWER_HEADER.unpack_from(self._map, ANSWER_AT)[-1]
        text = bytes(self._map[self._answer_at : self._answer_at + size])
        experts, reason = msgspec.msgpack.decode(text, type=tuple[list[int], str])
        return Refusal(experts, reason)

    def answer_rows(self, count: int, hidden: int, dtype: int) -> Rows:
        """Reader: the newest answer's rows, one per pair; copy them before asking again."""
        return self._view(self._answer_at, hidden, dtype)[:count]
