"""Where a rank's experts lie on its GPU: memory of its slot, which outlives it, so that they need not be loaded again.

The memory is in pieces, each a number of places for one expert and a header for each place. A header is written after
its content, by the same stream: what it names is whole, whatever dies meanwhile. A successor in the slot finds its
experts in place. A rank that lacks one copies it out of another slot's memory, also another GPU's, and looks at the
header again afterwards: if it has changed, what was copied does not count. Only then are the bytes taken from the host.
"""

from __future__ import annotations

import secrets
import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, Protocol

import structlog
import torch
from torch import Tensor

from membership.base.errors import ElasticError
from workers.model.backend import Reached
from workers.model.cuda.kernels import copy_blocks

PIECE_BYTES = 1 << 30
ALIGNMENT = 256
HEADER_BYTES = 128
WORD_BYTES = 8
CHUNK_BYTES = 1 << 16  # that a program copies
WORDS = 1024
_HEADER = struct.Struct("<qii96s")

Key = tuple[int, int]
"""(MoE layer, expert)."""
log = structlog.get_logger(__name__)


class RoomShape(NamedTuple):
    """Equal for all ranks of a model: two matrices per expert, as they are stored."""

    matrices: tuple[tuple[int, int], tuple[int, int]]
    dtype: torch.dtype
    experts: int  # in all layers

    @property
    def sizes(self) -> list[int]:
        """Bytes of each matrix, rounded up."""
        return [-(-rows * columns * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT for rows, columns in self.matrices]

    @property
    def place_bytes(self) -> int:
        """Of one expert: whole chunks."""
        return -(-sum(self.sizes) // CHUNK_BYTES) * CHUNK_BYTES

    @property
    def places(self) -> int:
        """In a piece."""
        return max(1, min(self.experts, PIECE_BYTES // self.place_bytes))

    @property
    def first(self) -> int:
        """Where the places of a piece begin."""
        return -(-self.places * HEADER_BYTES // CHUNK_BYTES) * CHUNK_BYTES

    @property
    def piece_bytes(self) -> int:
        """Of a piece."""
        return self.first + self.places * self.place_bytes


class Pieces(Protocol):
    """How memory is had. All errors are an ElasticError."""

    def own(self, number: int, *, make: bool) -> Tensor | None:
        """Bytes of our slot's piece of this number; None: there is none, and none is to be made."""

    def others(self) -> Sequence[Reached]:
        """Pieces of other slots, until `let_go`."""

    def let_go(self) -> None:
        """Of those; nothing is copied out of them any more."""


class Content(NamedTuple):
    """What a place holds. `number`: another one at each filling; 0: nothing."""

    number: int
    layer: int
    expert: int
    digest: bytes

    @property
    def name(self) -> tuple[Key, bytes]:
        """The same wherever it is."""
        return (self.layer, self.expert), self.digest

    def packed(self) -> bytes:
        """As a header."""
        return _HEADER.pack(self.number, self.layer, self.expert, self.digest).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def of(cls, header: bytes) -> Content:
        """The reverse."""
        number, layer, expert, digest = _HEADER.unpack_from(header)
        return cls(number, layer, expert, digest.rstrip(b"\0"))


NOTHING = Content(0, 0, 0, b"")


@dataclass(eq=False)
class _Place:
    piece: Tensor
    index: int
    content: Content
    used: bool = False  # by the bank; else it may be overwritten


class ExpertRoom:
    """Of one slot. `place` and `drop` may come from two threads."""

    def __init__(self, shape: RoomShape, pieces: Pieces, device: torch.device) -> None:
        """What a rank that was here before has left is found. Errors as of `pieces`."""
        self._shape, self._pieces, self._device = shape, pieces, device
        self._lock = threading.Lock()
        self._places: list[_Place] = []
        self._known: dict[tuple[Key, bytes], _Place] = {}
        self._others: dict[Key, list[tuple[Content, Reached, int]]] | None = None  # once looked for, in a load
        self._numbers = count(secrets.randbits(62))  # none that was here before gave out any of these
        self.kept = self.copied = self.filled = 0  # experts found in place, copied from another slot, from the host
        while (piece := pieces.own(self._piece_count, make=False)) is not None:
            self._add(piece)

    @property
    def _piece_count(self) -> int:
        return len(self._places) // self._shape.places

    def _add(self, piece: Tensor) -> None:
        for index, content in enumerate(self._contents(piece[: self._shape.places * HEADER_BYTES].cpu())):
            self._places.append(place := _Place(piece, index, content))
            if content.number:
                self._known[content.name] = place

    def _contents(self, headers: Tensor) -> list[Content]:
        said = headers.numpy().tobytes()
        return [Content.of(said[at : at + HEADER_BYTES]) for at in range(0, len(said), HEADER_BYTES)]

    def rest(self) -> None:
        """A load is over: the next one looks anew at what others have."""
        with self._lock:
            self._others = None
            self._pieces.let_go()
            log.info("experts_placed", kept=self.kept, copied=self.copied, filled=self.filled)

    def place(self, key: Key, digest: bytes, matrices: Sequence[Tensor]) -> list[Tensor] | None:
        """These matrices on the GPU, as they are stored. None: they do not fit, or nothing can tell them apart."""
        shapes = tuple(tuple(matrix.shape) for matrix in matrices)
        if not digest or shapes != self._shape.matrices or any(m.dtype != self._shape.dtype for m in matrices):
            return None
        with self._lock:
            place = self._known.get((key, digest))
            if place is not None:
                self.kept += not place.used
            elif (place := self._free()) is None:
                return None
            else:
                self._fill(place, Content(next(self._numbers), *key, digest), matrices)
            place.used = True
            return self._views(place)

    def drop(self, keys: Iterable[Key]) -> None:
        """These are not used any more; they stay until their places are needed."""
        gone = set(keys)
        with self._lock:
            for place in self._places:
                if (place.content.layer, place.content.expert) in gone:
                    place.used = False

    def _free(self) -> _Place | None:
        """One that is empty, before a new piece, before one with what may be wanted again."""
        unused = [place for place in self._places if not place.used]
        empty = next((place for place in unused if not place.content.number), None)
        if empty is not None or unused:
            return empty or unused[0]
        try:
            piece = self._pieces.own(self._piece_count, make=True)
        except ElasticError as error:
            log.warning("experts_end_with_their_rank", reason=str(error))
            return None
        if piece is None:
            return None
        self._add(piece)
        return self._places[-self._shape.places]

    def _fill(self, place: _Place, content: Content, matrices: Sequence[Tensor]) -> None:
        self._known.pop(place.content.name, None)
        self._say(place, NOTHING)
        if self._from_others(place, content):
            self.copied += 1
        else:
            for view, matrix in zip(self._views(place), matrices, strict=True):
                view.copy_(matrix)
            self.filled += 1
        self._say(place, content)
        self._known[content.name] = place

    def _look_around(self) -> dict[Key, list[tuple[Content, Reached, int]]]:
        """What other slots have now; nothing if they cannot be reached."""
        found: dict[Key, list[tuple[Content, Reached, int]]] = {}
        try:
            for piece in self._pieces.others():
                for index, content in enumerate(self._contents(self._headers(piece, 0, self._shape.places))):
                    if content.number:
                        found.setdefault((content.layer, content.expert), []).append((content, piece, index))
        except ElasticError as error:
            log.warning("experts_of_others_not_reached", reason=str(error))
        return found

    def _from_others(self, place: _Place, wanted: Content) -> bool:
        if self._others is None:
            self._others = self._look_around()
        for content, piece, index in self._others.get((wanted.layer, wanted.expert), ()):
            if content.digest != wanted.digest:
                continue
            chunks = self._shape.place_bytes // CHUNK_BYTES
            there, here = (self._shape.first // CHUNK_BYTES + at * chunks for at in (index, place.index))
            self._copy(piece.address, there, place.piece, here, chunks, CHUNK_BYTES)
            if self._contents(self._headers(piece, index, 1)) == [content]:
                return True
        return False

    def _say(self, place: _Place, content: Content) -> None:
        place.content = content
        at = place.index * HEADER_BYTES
        place.piece[at : at + HEADER_BYTES].copy_(torch.frombuffer(bytearray(content.packed()), dtype=torch.uint8))

    def _views(self, place: _Place) -> list[Tensor]:
        at, views = self._shape.first + place.index * self._shape.place_bytes, []
        for (rows, columns), size in zip(self._shape.matrices, self._shape.sizes, strict=True):
            nbytes = rows * columns * self._shape.dtype.itemsize
            views.append(place.piece[at : at + nbytes].view(self._shape.dtype).view(rows, columns))
            at += size
        return views

    def _headers(self, piece: Reached, first: int, number: int) -> Tensor:
        """Of another slot's piece, on the host."""
        room = torch.empty(number * HEADER_BYTES, dtype=torch.uint8, device=self._device)
        self._copy(piece.address, first, room, 0, number, HEADER_BYTES)
        return room.cpu()

    @staticmethod
    def _copy(address: int, there: int, target: Tensor, here: int, number: int, unit: int) -> None:
        """`number` units of so many bytes, from the one of number `there` to that of number `here`."""
        numbers = [[address] * number, list(range(there, there + number)), list(range(here, here + number))]
        parts = torch.tensor([[0, unit // WORD_BYTES]], device=target.device)
        copy_blocks[1, number](torch.tensor(numbers, device=target.device), target.view(torch.int64), parts, WORDS)
