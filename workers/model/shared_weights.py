"""A rank's side of its host's weight store: maps what is there, deposits what it had to load.

A shard holds the tensors of one or several entries in the very layout that the kernels use: each at a multiple of 64
bytes, which is also what torch's own allocator gives, so kernels that choose by alignment choose alike; then a header.
Weights are read straight into it, and the checksum of each tensor, which the header has, is made while it is read. So
a load takes no private memory, and what a later rank compares is what came from the file. Mapped memory is read-only: a
stray write is a fault and not a wrong answer in every rank of the host. The first other rank that reads a shard
compares its checksums; if one is wrong, the shard is dropped and the checkpoint is read instead. Who takes the very
content from a GPU needs its digest only, and does not spend a second per 4 GB on that.

`torch.frombuffer` warns about read-only memory, and switching warnings off is not for threads: it is given a ctypes
array at the mapping's address, which each tensor keeps alive, and with whose end the mapping ends.
"""

from __future__ import annotations

import fcntl
import math
import os
import struct
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import msgspec
import numpy as np
import structlog
import torch
from torch import Tensor

from membership.base.errors import ModelError, QueueError, WaitTimeout
from workers.ipc.handover import Link
from workers.ipc.huge_pages import map_private, map_shared
from workers.model.checkpoint import memory_of
from workers.model.content import Stamps
from workers.model.packing import Pack, packed, stays_plain
from workers.model.weight_digests import Part
from workers.protocol.load_progress import LoadProgress
from workers.protocol.weight_client import BATCH, SEALS, Held, Shards, WeightClient
from workers.protocol.weight_peers import Elsewhere, on_any_host

ALIGN = 64
# Of entries; a rank with another one asks for other keys. What is packed is so for one torch and one kind of processor.
LAYOUT = f"3-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
SERVED = "served"  # an entry without tensors
_SUFFIX = struct.Struct("<Q")
SUFFIX_BYTES = _SUFFIX.size
SIGN_EVERY_S, SIGN_TIMEOUT_S = 1.0, 15.0  # of a rank that reads what others wait for
log = structlog.get_logger(__name__)


class WeightsCorrupt(ModelError):
    """What the store holds is not what was deposited."""


class StoredAt(msgspec.Struct, frozen=True, array_like=True):
    """Where in its shard a tensor is, the checksum of its bytes there, and that of its bytes before it was packed."""

    entry: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    checksum: int
    content: int
    packing: bytes = b""  # empty: it is plain

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.kind.itemsize

    @property
    def kind(self) -> torch.dtype:
        """Its type. WeightsCorrupt: there is no such type."""
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise WeightsCorrupt(f"{self.entry}: no type {self.dtype}")
        return found

    def part(self) -> Part:
        """For a digest."""
        return Part(self.name, self.kind, self.shape, self.content)


class Header(msgspec.Struct, frozen=True, array_like=True):
    """At the end of a shard."""

    places: list[StoredAt]
    notes: dict[str, bytes]


class Mapped(msgspec.Struct, frozen=True):
    """An entry's tensors, and what else its maker wrote down."""

    tensors: dict[str, Tensor]
    note: bytes = b""


Unread = Callable[[Mapping[str, bytes]], bool]
"""Of entries by name, with their notes."""


class Slot(NamedTuple):
    """A tensor to be: `fill` writes all of it and returns the CRC-32 of its plain bytes, `pack` packs it afterwards."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: Callable[[Tensor], int]
    pack: Pack = stays_plain

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def write(self, tensor: Tensor) -> tuple[Part, bytes]:
        """Fill it and pack it: what was written, and how it is packed."""
        return Part(self.name, self.dtype, self.shape, self.fill(tensor)), self.pack(tensor)


class Entry(NamedTuple):
    """An entry to be: `note` is made of what was written."""

    name: str
    slots: Sequence[Slot]
    note: Callable[[Sequence[Part]], bytes]

    def alone(self) -> Mapped:
        """It in memory of this process."""
        rooms = [torch.empty(slot.shape, dtype=slot.dtype) for slot in self.slots]
        written = [slot.write(room) for slot, room in zip(self.slots, rooms, strict=True)]
        tensors = {
            part.name: packed(room, packing) if packing else room
            for room, (part, packing) in zip(rooms, written, strict=True)
        }
        return Mapped(tensors, self.note([part for part, _ in written]))


def copied(tensor: Tensor) -> Callable[[Tensor], int]:
    """Fills a slot from a tensor that is there."""

    def fill(room: Tensor) -> int:
        room.copy_(tensor)
        return zlib.crc32(memory_of(room))

    return fill


class Served(msgspec.Struct, frozen=True):
    """What the store was filled from: later ranks of the host ask for the same, whatever the files are by then."""

    stamps: Stamps
    config: str  # digest of config.json


class SharedWeights:
    """Entries of one checkpoint in one dtype. Safe to use from several threads. A store that fails only costs time."""

    def __init__(self, client: WeightClient, scope: str) -> None:
        self._client = client
        self._scope = f"{scope}/layout{LAYOUT}"
        self._lock = threading.Lock()
        self._right: list[tuple[int, int]] = []
        self._wrong: list[tuple[int, int]] = []
        self._pages: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._failed = False

    def find(self, names: Sequence[str]) -> dict[str, Mapped]:
        """Map what the store has of `names`."""
        found: dict[str, Mapped] = {}
        for start in range(0, len(names), BATCH):
            keys = [self._key(name) for name in names[start : start + BATCH]]
            found |= self._opened(self._ask(lambda keys=keys: self._client.find(keys)) or [])  # type: ignore[misc]
        return found

    @contextmanager
    def session(self, progress: LoadProgress) -> Iterator[Session]:
        """For a load: what it claims is its to read until the end. That other ranks still read is progress."""
        news = threading.Event()

        def on_news() -> None:
            progress.mark()
            news.set()

        link, number = self._ask(lambda: self._client.join(on_news)) or (None, 0)
        try:
            yield Session(self, link, number, news)
        finally:
            if link is not None:
                link.close()

    def claim(
        self, session: int, names: Sequence[str], unread: Unread = lambda notes: False
    ) -> tuple[dict[str, Mapped], list[str]]:
        """Map what the store has of `names` (at most BATCH), and say which of the rest this session must read.

        `unread`: whether no bytes of these entries of a shard will be looked at, which are not compared then.
        """
        keys = {self._key(name): name for name in names}
        answer = self._ask(lambda: self._client.claim(session, list(keys)))
        if answer is None:
            return {}, list(names)
        found = self._opened(answer[0], unread=unread)
        damaged = {key for held, _ in answer[0] for key in held.keys if keys[key] not in found}
        return found, [keys[key] for key in keys if key in damaged or key in answer[1]]

    def put(self, name: str, tensors: Mapping[str, Tensor], note: bytes = b"") -> Mapped | None:
        """Deposit, and map what the store holds then: this, or what came first. None: it has nothing, keep your own."""
        slots = [Slot(key, tensor.dtype, tuple(tensor.shape), copied(tensor)) for key, tensor in tensors.items()]
        return self.fill([Entry(name, slots, lambda parts: note)]).get(name)

    def fill(self, entries: Sequence[Entry]) -> dict[str, Mapped]:
        """Write one shard of these entries, deposit it and map what the store holds then. Empty: it could not be."""

        def deposit() -> tuple[int, Shards]:
            keyed = [entry._replace(name=self._key(entry.name)) for entry in entries]
            fd, checksum = write_shard(keyed)
            try:
                return checksum, self._client.deposit([entry.name for entry in keyed], checksum, fd)
            finally:
                os.close(fd)

        checksum, shards = self._ask(deposit) or (0, [])
        # What this rank has just read is right; that it is the same in the store is for the first other one to see.
        return self._opened(shards, trusted=checksum)

    def book(self, nbytes: int) -> float:
        """Seconds to wait before `nbytes` of the checkpoint are read, so that serving ranks keep their bandwidth."""
        return float(self._ask(lambda: self._client.book(nbytes)) or 0.0)

    def on_any_host(self, name: str) -> str:
        """What other hosts call the entry."""
        return on_any_host(self._key(name))

    def wanted(self, names: Sequence[str]) -> Elsewhere:
        """Which hosts may have these entries (at most BATCH), and what they are by content."""
        return self._ask(lambda: self._client.wanted(names)) or Elsewhere([], [b""] * len(names))

    def wrong(self, node: str, name: str, reason: str) -> None:
        """Say which host could not give an entry."""
        self._ask(lambda: self._client.wrong(node, name, reason))

    def takes(self, session: int, nodes: Sequence[str]) -> None:
        """Say from which hosts entries of this session come."""
        self._ask(lambda: self._client.takes(session, nodes))

    def served(self) -> Served | None:
        """What the host's ranks have loaded, as the first of them noted it."""
        found = self.find([SERVED]).get(SERVED)
        return msgspec.msgpack.decode(found.note, type=Served) if found is not None else None

    def note_served(self, served: Served) -> None:
        """Note what this host serves, unless another rank did so before."""
        self.put(SERVED, {}, msgspec.msgpack.encode(served))

    def report(self) -> None:
        """At the end of each load, if none was compared, too: which checksums were compared since the last report."""
        with self._lock:
            right, self._right = self._right, []
            wrong, self._wrong = self._wrong, []
        self._ask(lambda: self._client.checked(right, wrong))

    def _key(self, name: str) -> str:
        return f"{self._scope}/{name}"

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (QueueError, WaitTimeout, OSError) as error:
            if not self._failed:
                log.warning("weight_store_failed", error=str(error))
            self._failed = True  # said once; asked again all the same
            return None

    def _opened(
        self, shards: Shards, trusted: int | None = None, unread: Unread = lambda notes: False
    ) -> dict[str, Mapped]:
        """Map shards and close their descriptors; the entries that were asked for, of those that are not damaged."""
        with ExitStack() as opened:  # also when a device fails at one of them
            for _, fd in shards:
                opened.callback(os.close, fd)
            return self._entries_in(shards, trusted, unread)

    def _entries_in(self, shards: Shards, trusted: int | None, unread: Unread) -> dict[str, Mapped]:
        found: dict[str, Mapped] = {}
        for held, fd in shards:
            try:
                entries = self._mapped(held, fd, unread, check=not held.verified and held.checksum != trusted)
            except WeightsCorrupt as error:
                log.error("weights_corrupt", keys=held.keys, error=str(error))
                with self._lock:
                    self._wrong.append((held.shard, held.checksum))
                self.report()  # so that no other rank maps it
            except OSError as error:
                log.warning("weights_not_mapped", keys=held.keys, error=str(error))
            else:
                found |= {key.removeprefix(f"{self._scope}/"): entries[key] for key in held.keys if key in entries}
        return found

    def _mapped(self, held: Held, fd: int, unread: Unread, *, check: bool) -> dict[str, Mapped]:
        """All entries of a shard; mapped once, for as long as a tensor of it is in use."""
        with self._lock:
            pages = self._pages.get(held.shard)
        if pages is None:
            pages = map_shard(fd, held)
            if check:
                entries = entries_of(pages, held)
                prefix = len(f"{self._scope}/")
                if unread({key[prefix:]: entries[key].note for key in held.keys if key in entries}):
                    return entries
                compare(pages, held)
                with self._lock:
                    self._right.append((held.shard, held.checksum))
            with self._lock:
                self._pages[held.shard] = pages
        return entries_of(pages, held)


class Session:
    """The claims of one load."""

    def __init__(self, shared: SharedWeights, link: Link | None, number: int, news: threading.Event) -> None:
        self._shared, self._link, self.number, self._news = shared, link, number, news
        self._notified_at = 0.0

    def claim(self, names: Sequence[str], unread: Unread = lambda notes: False) -> tuple[dict[str, Mapped], list[str]]:
        """See `SharedWeights.claim`. What is in neither is being read by another rank: `wait`, and claim again."""
        return self._shared.claim(self.number, names, unread)

    def wait(self, timeout_s: float = SIGN_TIMEOUT_S) -> bool:
        """Until another rank has deposited, still reads, or has gone, since the last wait. False: no sign of any, so
        read it as well."""
        if self._link is None or self._link.gone or not self._news.wait(timeout_s):
            return False
        self._news.clear()
        return True

    def still_reads(self) -> None:
        """To be called while something is read; the ranks that wait for it are notified now and then."""
        now = time.monotonic()
        if self._link is not None and now >= self._notified_at + SIGN_EVERY_S:
            self._notified_at = now
            with suppress(QueueError):  # without the store no rank waits
                self._link.send(b".")


def write_shard(entries: Sequence[Entry]) -> tuple[int, int]:
    """Fill a new sealed memfd: its descriptor, which is the caller's, and its header's checksum."""
    size = sum(_aligned(slot.nbytes) for entry in entries for slot in entry.slots)
    fd = os.memfd_create("elastic-ep-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        places, notes = _filled(fd, size, entries) if size else ([], {e.name: e.note(()) for e in entries})
        header = msgspec.msgpack.encode(Header(places, notes))
        os.pwrite(fd, header + _SUFFIX.pack(len(header)), size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)  # fails while anybody could still write
    except BaseException:
        os.close(fd)
        raise
    return fd, zlib.crc32(header)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def _filled(fd: int, size: int, entries: Sequence[Entry]) -> tuple[list[StoredAt], dict[str, bytes]]:
    places, notes, offset = [], {}, 0
    os.ftruncate(fd, size)
    memory = map_shared(fd, size)
    os.posix_fallocate(fd, 0, size)  # a lack of memory is an error here, not a SIGBUS below
    for entry in entries:
        parts = []
        for slot in entry.slots:
            room = _tensor(memory, slot.dtype, slot.shape, offset)
            part, packing = slot.write(room)
            checksum = zlib.crc32(memory_of(room)) if packing else part.checksum
            dtype = str(slot.dtype).removeprefix("torch.")
            at = StoredAt(entry.name, slot.name, dtype, slot.shape, offset, checksum, part.checksum, packing)
            places.append(at)
            del room
            parts.append(part)
            offset += _aligned(slot.nbytes)
        notes[entry.name] = entry.note(parts)
    return places, notes


def _tensor(memory: Any, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    count = math.prod(shape)
    flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
    return flat.view(shape)


def map_shard(fd: int, held: Held) -> Any:
    """Map a sealed memfd read-only. WeightsCorrupt, OSError."""
    size = os.fstat(fd).st_size
    if size != held.size or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise WeightsCorrupt(f"{held.keys}: {size} bytes instead of {held.size}, or not sealed")
    return map_private(fd, size)


def compare(pages: Any, held: Held) -> None:
    """WeightsCorrupt unless header and tensors have the checksums that they were deposited with."""
    memory = _bytes(pages)
    for place in _header(memory, held).places:
        if zlib.crc32(memory[place.offset : place.offset + place.nbytes]) != place.checksum:
            raise WeightsCorrupt(f"{held.keys}: its bytes do not have the checksum they were deposited with")


def entries_of(pages: Any, held: Held) -> dict[str, Mapped]:
    """The entries of a mapped shard. WeightsCorrupt: its header is, or one is packed as this process does not pack."""
    header = _header(_bytes(pages), held)
    made = {name: Mapped({}, note) for name, note in header.notes.items()}
    for place in header.places:
        room = _tensor(pages, place.kind, place.shape, place.offset)
        try:
            made[place.entry].tensors[place.name] = packed(room, place.packing) if place.packing else room
        except ModelError as error:
            raise WeightsCorrupt(f"{place.entry}: {error}") from error
    return made


def _bytes(pages: Any) -> memoryview:
    return np.frombuffer(pages, np.uint8).data


def header_size(tail: memoryview) -> int:
    """How many bytes at the end of a shard are its header, given at least the last SUFFIX_BYTES."""
    return int(_SUFFIX.unpack(tail[-SUFFIX_BYTES:])[0]) + SUFFIX_BYTES


def header_of(memory: memoryview, checksum: int) -> Header:
    """The header of a shard, or of its end. WeightsCorrupt unless it has the checksum that it was deposited with, which
    is compared before anything in it is used: its offsets, its types, how oneDNN has packed.
    """
    try:
        said = memory[-header_size(memory) : -SUFFIX_BYTES]
        if zlib.crc32(said) != checksum:
            raise WeightsCorrupt("its header does not have the checksum it was deposited with")
        return msgspec.msgpack.decode(said, type=Header)
    except (msgspec.MsgspecError, struct.error) as error:
        raise WeightsCorrupt("no header") from error


def _header(memory: memoryview, held: Held) -> Header:
    try:
        return header_of(memory, held.checksum)
    except WeightsCorrupt as error:
        raise WeightsCorrupt(f"{held.keys}: {error}") from error
