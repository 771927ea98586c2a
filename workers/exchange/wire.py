"""The layout of a lane: the memory in which one rank writes what it asks and answers one other rank.

Only the writer's process stores into a lane, and a lane belongs to one pair of incarnations. A word is published last
(the sequence number), so a reader sees a message whole or not at all. At most one request is open per lane: a newer one
replaces it, and an answer counts only if it echoes the whole tag of the request that is open now.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from workers.exchange.router import Ints, Parcel
from workers.ipc.fence import fence
from workers.ipc.shared_memory import PAGE, Segment, SegmentError

Rows = npt.NDArray[Any]  # [R, H]; the bits of a float type as integers of its width, which numpy can copy for any type

AREA = 32 << 20  # bytes for the rows of one request, and of one answer; memory is taken as it is first used
BULK = 8 << 20  # bytes for what belongs to no step (`model/kv_transfer.py`): so much is copied in one go at most
MAX_PAIRS = 1 << 15
_INDEX = 3 * 8 * MAX_PAIRS
ASK, ANSWER = 0, 8  # published sequence numbers, in words; each in its own cache line
ASK_AT, ANSWER_AT = 128, 256  # headers, in bytes
_ASK_HEADER = struct.Struct("<12q")
_ANSWER_HEADER = struct.Struct("<9q")

DTYPES: tuple[tuple[torch.dtype, Any], ...] = (
    (torch.float32, np.int32),
    (torch.bfloat16, np.int16),
    (torch.float16, np.int16),
)
DTYPE_CODES = {dtype: code for code, (dtype, _) in enumerate(DTYPES)}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor: torch.Tensor) -> Rows:
    """The same memory as integers."""
    return tensor.view(BITS[tensor.dtype]).numpy()


class Tag(NamedTuple):
    """What a request belongs to. `sequence` alone is unique in a lane; the rest must agree too."""

    sequence: int
    epoch: int
    engine_token: int
    step: int
    attempt: int
    layer: int


class Request(NamedTuple):
    """What a peer asks. `rows` is a view of its lane: it may change if the peer gives up on this request."""

    tag: Tag
    experts: list[int]
    counts: list[int]
    row_of: Ints
    rows: Rows
    dtype: int


class Refusal(NamedTuple):
    """Why a peer has not computed something, and which experts it cannot answer for."""

    experts: list[int]
    reason: str


def lane_bytes(area: int = AREA) -> int:
    """Size of a lane's segment."""
    return PAGE + _INDEX + 2 * area + BULK


def most_pairs(area: int, row_bytes: int) -> int:
    """How many pairs one request may have, so that its rows and its answer fit."""
    return max(1, min(area // row_bytes, MAX_PAIRS))


class Lane:
    """One direction between two ranks, seen by its writer or by its reader."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._map = memoryview(segment.map)
        self._words = self._map[:PAGE].cast("Q")
        index = np.frombuffer(self._map, np.int64, 3 * MAX_PAIRS, PAGE).reshape(3, MAX_PAIRS)
        self._row_of, self._experts, self._counts = index
        self.area = (segment.size - PAGE - _INDEX - BULK) // 2 // PAGE * PAGE
        self._ask_at = PAGE + _INDEX
        self._answer_at = self._ask_at + self.area
        self._bulk_at = segment.size - BULK
        self._rows: dict[tuple[int, int, int], Rows] = {}
        self._reserved = {self._ask_at: 0, self._answer_at: 0, self._bulk_at: 0}

    def close(self) -> None:
        """Let go of the memory; it is unmapped when the last view of it goes."""
        self._rows.clear()
        del self._row_of, self._experts, self._counts, self._words, self._map
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
        """Writer: where so many bytes belong, or as many as fit. Who reads them knows when from elsewhere."""
        nbytes = min(nbytes, BULK)
        self._reserve(self._bulk_at, nbytes, BULK)
        return self._map[self._bulk_at : self._bulk_at + nbytes]

    def bulk(self) -> memoryview[int]:
        """Reader: what was written there last."""
        return self._map[self._bulk_at :]

    # -- requests ----------------------------------------------------------------------------------------------------

    def ask(self, tag: Tag, incarnation: int, parcel: Parcel, rows: Rows, dtype: int) -> None:
        """Writer: open a request in place of any earlier one, whose number is taken away first."""
        self._words[ASK] = 0
        fence()
        count, pairs, experts, hidden = len(parcel.rows), len(parcel.pairs), len(parcel.experts), rows.shape[1]
        rows.take(parcel.rows, 0, self._room(self._ask_at, count, hidden, dtype), "clip")
        self._row_of[:pairs] = parcel.row_of
        self._experts[:experts] = parcel.experts
        self._counts[:experts] = parcel.counts
        _ASK_HEADER.pack_into(self._map, ASK_AT, *tag, incarnation, count, pairs, experts, hidden, dtype)
        fence()
        self._words[ASK] = tag.sequence

    def asked(self) -> int:
        """Reader: number of the newest request (0: none yet, or it is being written)."""
        return self._words[ASK]

    def request(self, sequence: int, incarnation: int) -> Request | None:
        """Reader: the request of this number, or None if it is being replaced or is not from `incarnation`."""
        fence()
        *tag, sender, count, pairs, experts, hidden, dtype = _ASK_HEADER.unpack_from(self._map, ASK_AT)
        row_of = self._row_of[:pairs].copy()
        found = Request(
            Tag(*tag), self._experts[:experts].tolist(), self._counts[:experts].tolist(), row_of,
            self._view(self._ask_at, hidden, dtype)[:count], dtype,
        )  # fmt: skip
        fence()
        return found if self._words[ASK] == sequence == tag[0] and sender == incarnation else None

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
        self._words[ANSWER] = tag.sequence

    def answered(self) -> int:
        """Reader: number of the newest answer."""
        return self._words[ANSWER]

    def refusal(self, tag: Tag, incarnation: int) -> Refusal | None:
        """Reader: None if the newest answer is rows for the request `tag` from `incarnation`; else why it is not."""
        fence()
        *echo, sender, refused, size = _ANSWER_HEADER.unpack_from(self._map, ANSWER_AT)
        if tuple(echo) != tag or sender != incarnation:
            return Refusal([], f"answer to {echo} of incarnation {sender} instead of {tag} of {incarnation}")
        if not refused:
            return None
        text = bytes(self._map[self._answer_at : self._answer_at + size])
        experts, reason = msgspec.msgpack.decode(text, type=tuple[list[int], str])
        return Refusal(experts, reason)

    def answer_rows(self, count: int, hidden: int, dtype: int) -> Rows:
        """Reader: the newest answer's rows, one per pair; copy them before asking again."""
        return self._view(self._answer_at, hidden, dtype)[:count]
