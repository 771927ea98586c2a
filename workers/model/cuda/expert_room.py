"""Where a rank's experts lie on its GPU: memory of its slot, which outlives it, so that they need not be loaded again.

The memory is in pieces, each a number of places for one expert and a header for each place. A header is written after
its content, by the same stream: what it names is whole, whatever dies meanwhile. A successor in the slot finds its
experts in place. A rank that lacks some copies them out of other slots' memory, also another GPU's, and looks at the
headers again afterwards: what has changed does not count. Only then are the bytes taken from the host. What the host
waits for costs more than the copies do, so as many as can be are copied at once (`fetch`).
"""

from __future__ import annotations

import secrets
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, Protocol, TypeVar

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
_HEADER = struct.Struct("<qiiB95s")  # with the digest's length: it may end with zeros

Key = tuple[int, int]
"""(MoE layer, expert)."""
T = TypeVar("T")
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
        said = _HEADER.pack(self.number, self.layer, self.expert, len(self.digest), self.digest)
        return said.ljust(HEADER_BYTES, b"\0")

    @classmethod
    def of(cls, header: bytes) -> Content:
        """The reverse."""
        number, layer, expert, length, digest = _HEADER.unpack_from(header)
        return cls(number, layer, expert, digest[:length])


NOTHING = Content(0, 0, 0, b"")


@dataclass(eq=False)
class _Place:
    piece: Tensor  # bytes
    whole: Tensor  # the same, in the type of matrices
    index: int
    content: Content
    used: bool = False  # by the bank; else it may be overwritten
    fetched: bool = False  # in this load, for the bank


class _Source(NamedTuple):
    """Where another slot has an expert, and what its header said."""

    content: Content
    piece: Reached
    at: int  # of its places


class _Copy(NamedTuple):
    """To be made."""

    place: _Place
    content: Content  # with a number of ours
    source: _Source


class ExpertRoom:
    """Of one slot. `place` and `drop` may come from two threads."""

    def __init__(self, shape: RoomShape, pieces: Pieces, device: torch.device) -> None:
        """What a rank that was here before has left is found. Errors as of `pieces`."""
        self._shape, self._pieces, self._device = shape, pieces, device
        self._first, self._sizes, self._place_bytes = shape.first, shape.sizes, shape.place_bytes
        self._lock = threading.Lock()
        self._places: list[_Place] = []
        self._known: dict[tuple[Key, bytes], _Place] = {}
        self._empty: deque[_Place] = deque()  # where nothing was when it was put here
        self._expected: set[Key] = set()  # of the load under way
        self._others: dict[Key, list[_Source]] | None = None  # once looked for, in a load
        self._numbers = count(secrets.randbits(62))  # none that was here before gave out any of these
        self.kept = self.copied = self.filled = 0  # experts found in place, copied from another slot, from the host
        while (piece := pieces.own(self._piece_count, make=False)) is not None:
            self._add(piece)

    @property
    def _piece_count(self) -> int:
        return len(self._places) // self._shape.places

    def _add(self, piece: Tensor) -> None:
        whole = piece[: len(piece) // self._shape.dtype.itemsize * self._shape.dtype.itemsize].view(self._shape.dtype)
        for index, content in enumerate(self._contents(piece[: self._shape.places * HEADER_BYTES].cpu())):
            self._places.append(place := _Place(piece, whole, index, content))
            if content.number:
                self._known[content.name] = place
            else:
                self._empty.append(place)

    def _contents(self, headers: Tensor) -> list[Content]:
        said = headers.numpy().tobytes()
        return [Content.of(said[at : at + HEADER_BYTES]) for at in range(0, len(said), HEADER_BYTES)]

    def rest(self) -> None:
        """A load is over: the next one looks anew at what others have."""
        with self._lock:
            self._others = None
            self._expected.clear()
            self._pieces.let_go()
            for place in self._places:
                place.fetched = False  # else a load that was given up would keep it
            log.info("experts_placed", kept=self.kept, copied=self.copied, filled=self.filled)

    def expect(self, keys: Iterable[Key]) -> None:
        """A load of these begins. What is here of them is overwritten last, until `rest`: all that a predecessor left
        is unused, and else each one that is missing would take the place of the next.
        """
        with self._lock:
            self._expected.update(keys)

    def fetch(self, wanted: Mapping[Key, bytes]) -> bool:
        """Copy what other slots have of these experts, by digest, all at once; whether all of them are here then.

        What is here stays until `rest`.
        """
        with self._lock:
            return self._fetch(wanted)

    def _fetch(self, wanted: Mapping[Key, bytes]) -> bool:
        for place in (self._known.get(name) for name in wanted.items()):
            if place is not None:
                self.kept += not (place.used or place.fetched)
                place.fetched = True
        copies = []  # once no place of what is here can be taken for them
        for key, digest in wanted.items():
            if (key, digest) in self._known:
                continue
            if (source := self._elsewhere(key, digest)) is not None and (empty := self._free()) is not None:
                empty.fetched = True
                copies.append(_Copy(empty, Content(next(self._numbers), *key, digest), source))
        self._copy_all(copies)
        return all(name in self._known for name in wanted.items())

    def _elsewhere(self, key: Key, digest: bytes) -> _Source | None:
        if self._others is None:
            self._others = self._look_around()
        return next((source for source in self._others.get(key, ()) if source.content.digest == digest), None)

    def _copy_all(self, copies: Sequence[_Copy]) -> None:
        """Those whose source was the same before and afterwards are known then."""
        for copy in copies:
            self._known.pop(copy.place.content.name, None)
        self._say([(copy.place, NOTHING) for copy in copies])
        chunks, first = self._shape.place_bytes // CHUNK_BYTES, self._shape.first // CHUNK_BYTES
        for group in _alike(copies, lambda copy: copy.place.piece):
            addresses = [copy.source.piece.address for copy in group for _ in range(chunks)]
            there = [first + copy.source.at * chunks + i for copy in group for i in range(chunks)]
            here = [first + copy.place.index * chunks + i for copy in group for i in range(chunks)]
            self._copy([addresses, there, here], group[0].place.piece, CHUNK_BYTES)
        whole = []
        for group in _alike(copies, lambda copy: copy.source.piece):
            now = self._headers(group[0].source.piece)
            whole += [copy for copy in group if now[copy.source.at] == copy.source.content]
        self._say([(copy.place, copy.content) for copy in whole])
        self._known |= {copy.content.name: copy.place for copy in whole}
        self.copied += len(whole)
        for copy in copies:
            if not copy.place.content.number:
                copy.place.fetched = False
                self._empty.append(copy.place)

    def place(self, key: Key, digest: bytes, matrices: Sequence[Tensor]) -> list[Tensor] | None:
        """These matrices on the GPU, as they are stored. None: they do not fit, or nothing can tell them apart."""
        shapes = tuple(tuple(matrix.shape) for matrix in matrices)
        if not digest or shapes != self._shape.matrices or any(m.dtype != self._shape.dtype for m in matrices):
            return None
        with self._lock:
            place = self._known.get((key, digest))
            if place is None or not (place.used or place.fetched):
                self._fetch({key: digest})
                place = self._known.get((key, digest))
            if place is None:
                if (place := self._free()) is None:
                    return None
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
        """One that is empty, else one that is not used, else one in a new piece."""
        while self._empty:
            place = self._empty.popleft()
            if not (place.used or place.fetched or place.content.number):
                return place
        unused = (place for place in self._places if not (place.used or place.fetched))
        last = None
        for last in unused:
            if (last.content.layer, last.content.expert) not in self._expected:
                break
        if last is not None:  # else the latest of those that are expected
            return last
        try:
            piece = self._pieces.own(self._piece_count, make=True)
        except ElasticError as error:
            log.warning("experts_end_with_their_rank", reason=str(error))
            return None
        if piece is None:
            return None
        self._add(piece)
        return self._free()

    def _fill(self, place: _Place, content: Content, matrices: Sequence[Tensor]) -> None:
        self._known.pop(place.content.name, None)
        self._say([(place, NOTHING)])
        for view, matrix in zip(self._views(place), matrices, strict=True):
            view.copy_(matrix)
        self.filled += 1
        self._say([(place, content)])
        self._known[content.name] = place

    def _look_around(self) -> dict[Key, list[_Source]]:
        """What other slots have now; nothing if they cannot be reached."""
        found: dict[Key, list[_Source]] = {}
        try:
            for piece in self._pieces.others():
                for index, content in enumerate(self._headers(piece)):
                    if content.number:
                        source = _Source(content, piece, index)
                        found.setdefault((content.layer, content.expert), []).append(source)
        except ElasticError as error:
            log.warning("experts_of_others_not_reached", reason=str(error))
        return found

    def _say(self, contents: Sequence[tuple[_Place, Content]]) -> None:
        """What these places hold from now on."""
        for place, content in contents:
            place.content = content
        for group in _alike(contents, lambda each: each[0].piece):
            piece, headers = group[0][0].piece, bytearray(b"".join(content.packed() for _, content in group))
            table = piece[: self._shape.places * HEADER_BYTES].view(-1, HEADER_BYTES)
            rows = torch.frombuffer(headers, dtype=torch.uint8).view(-1, HEADER_BYTES).to(piece.device)
            table[torch.tensor([place.index for place, _ in group], device=piece.device)] = rows

    def _views(self, place: _Place) -> list[Tensor]:
        at, views = self._first + place.index * self._place_bytes, []
        for (rows, columns), size in zip(self._shape.matrices, self._sizes, strict=True):
            views.append(place.whole.as_strided((rows, columns), (columns, 1), at // self._shape.dtype.itemsize))
            at += size
        return views

    def _headers(self, piece: Reached) -> list[Content]:
        """Of another slot's piece."""
        count = self._shape.places
        room = torch.empty(count * HEADER_BYTES, dtype=torch.uint8, device=self._device)
        self._copy([[piece.address] * count, list(range(count)), list(range(count))], room, HEADER_BYTES)
        return self._contents(room.cpu())

    @staticmethod
    def _copy(numbers: Sequence[Sequence[int]], target: Tensor, unit: int) -> None:
        """Units of so many bytes: out of the memory at an address the one of a number, to one of `target`."""
        parts = torch.tensor([[0, unit // WORD_BYTES]], device=target.device)
        on_device = torch.tensor(numbers, device=target.device)
        copy_blocks[1, len(numbers[0])](on_device, target.view(torch.int64), parts, WORDS)


def _alike(these: Iterable[T], kind: Callable[[T], object]) -> list[list[T]]:
    """In groups of the same object, in order."""
    groups: dict[int, list[T]] = {}
    for each in these:
        groups.setdefault(id(kind(each)), []).append(each)
    return list(groups.values())
