"""A rank's side of its host's weight store: maps what is there, deposits what it had to load.

An entry holds named tensors in the very layout that the kernels use: first a header, then each tensor at a multiple of
64 bytes, which is also what torch's own allocator gives, so kernels that choose by alignment choose alike. Mapped
memory is read-only: a stray write is a fault and not a wrong answer in every rank of the host. The first rank that maps
an entry compares its checksum; if it is wrong, the entry is dropped and the checkpoint is read instead.

`torch.frombuffer` warns about read-only memory, and switching warnings off is not for threads: it is given a ctypes
array at the mapping's address, which each tensor keeps alive, and with whose end the mapping ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import mmap
import os
import struct
import threading
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
import structlog
import torch
from torch import Tensor

from membership.base.errors import ModelError, QueueError, WaitTimeout
from workers.model.content import Stamps
from workers.protocol.weight_client import BATCH, SEALS, Held, WeightClient

ALIGN = 64
LAYOUT = 1  # of entries; a rank with another one asks for other keys
SERVED = "served"  # an entry without tensors
_PREFIX = struct.Struct("<Q")
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
log = structlog.get_logger(__name__)


class WeightsCorrupt(ModelError):
    """What the store holds is not what was deposited."""


class _Place(msgspec.Struct, frozen=True, array_like=True):
    name: str
    dtype: str
    shape: list[int]
    offset: int


class _Header(msgspec.Struct, frozen=True, array_like=True):
    places: list[_Place]
    note: bytes


class Mapped(msgspec.Struct, frozen=True):
    """An entry's tensors, and what else its maker wrote down."""

    tensors: dict[str, Tensor]
    note: bytes = b""


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
        self._right: list[tuple[str, int]] = []
        self._wrong: list[tuple[str, int]] = []
        self._failed = False

    def find(self, names: Sequence[str]) -> dict[str, Mapped]:
        """Map what the store has of `names`."""
        found: dict[str, Mapped] = {}
        for start in range(0, len(names), BATCH):
            part = {self._key(name): name for name in names[start : start + BATCH]}
            answer = self._ask(lambda keys=tuple(part): self._client.find(keys)) or {}  # type: ignore[misc]
            for key, (held, fd) in answer.items():
                if (mapped := self._open(held, fd)) is not None:
                    found[part[key]] = mapped
        return found

    def put(self, name: str, tensors: Mapping[str, Tensor], note: bytes = b"") -> Mapped | None:
        """Deposit, and map what the store holds then: this, or what came first. None: it has nothing, keep your own."""
        answer = self._ask(lambda: self._deposit(self._key(name), tensors, note))
        return self._open(*answer) if answer is not None else None

    def book(self, nbytes: int) -> float:
        """Seconds to wait before `nbytes` of the checkpoint are read, so that serving ranks keep their bandwidth."""
        return float(self._ask(lambda: self._client.book(nbytes)) or 0.0)

    def served(self) -> Served | None:
        """What the host's ranks have loaded, as the first of them noted it."""
        found = self.find([SERVED]).get(SERVED)
        return msgspec.msgpack.decode(found.note, type=Served) if found is not None else None

    def note_served(self, served: Served) -> None:
        """Note what this host serves, unless another rank did so before."""
        self.put(SERVED, {}, msgspec.msgpack.encode(served))

    def report(self) -> None:
        """Report to the store which checksums were compared since the last report; at the end of each load."""
        with self._lock:
            right, self._right = self._right, []
            wrong, self._wrong = self._wrong, []
        if right or wrong:
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

    def _deposit(self, key: str, tensors: Mapping[str, Tensor], note: bytes) -> tuple[Held, int]:
        fd, checksum = write_entry(tensors, note)
        try:
            return self._client.deposit(key, checksum, fd)
        finally:
            os.close(fd)

    def _open(self, held: Held, fd: int) -> Mapped | None:
        """Map an entry and close the descriptor; None if it is damaged or there is no room."""
        try:
            mapped = map_entry(fd, held)
        except WeightsCorrupt as error:
            log.error("weights_corrupt", key=held.key, error=str(error))
            with self._lock:
                self._wrong.append((held.key, held.checksum))
            self.report()  # so that no other rank maps it
            return None
        except OSError as error:
            log.warning("weights_not_mapped", key=held.key, error=str(error))
            return None
        finally:
            os.close(fd)
        if not held.verified:
            with self._lock:
                self._right.append((held.key, held.checksum))
        return mapped


def write_entry(tensors: Mapping[str, Tensor], note: bytes = b"") -> tuple[int, int]:
    """Copy tensors into a new sealed memfd: its descriptor, which is the caller's, and its checksum."""
    places, offset = [], 0
    for name, tensor in tensors.items():
        places.append(_Place(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset))
        offset += -(-tensor.nbytes // ALIGN) * ALIGN
    header = msgspec.msgpack.encode(_Header(places, note))
    start = _first(len(header))
    size = start + offset
    fd = os.memfd_create("elastic-ep-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)  # a lack of memory is an error here, not a SIGBUS below
        with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
            memory[: _PREFIX.size + len(header)] = _PREFIX.pack(len(header)) + header
            for place, tensor in zip(places, tensors.values(), strict=True):
                _fill(memory, start + place.offset, tensor)
            checksum = zlib.crc32(memory)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)  # fails while anybody could still write
    except BaseException:
        os.close(fd)
        raise
    return fd, checksum


def _first(header: int) -> int:
    return -(-(_PREFIX.size + header) // ALIGN) * ALIGN


def _fill(memory: mmap.mmap, offset: int, tensor: Tensor) -> None:
    if not tensor.nbytes:
        return
    target = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    target.view(tensor.shape).copy_(tensor)


def map_entry(fd: int, held: Held) -> Mapped:
    """Map a sealed memfd read-only and, unless that was done before, compare its checksum. WeightsCorrupt, OSError."""
    size = os.fstat(fd).st_size
    if size != held.size or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise WeightsCorrupt(f"{held.key}: {size} bytes instead of {held.size}, or not sealed")
    pages = _map(fd, size)
    if not held.verified and zlib.crc32(pages) != held.checksum:
        raise WeightsCorrupt(f"{held.key}: its bytes do not have the checksum they were deposited with")
    address = ctypes.addressof(pages)
    try:
        (length,) = _PREFIX.unpack_from(pages)
        header = msgspec.msgpack.decode(ctypes.string_at(address + _PREFIX.size, length), type=_Header)
    except (msgspec.MsgspecError, struct.error) as error:
        raise WeightsCorrupt(f"{held.key}: no header") from error
    start = _first(length)
    tensors = {}
    for place in header.places:
        count = math.prod(place.shape)
        dtype = getattr(torch, place.dtype)
        if count:
            flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=start + place.offset)
        else:
            flat = torch.empty(0, dtype=dtype)
        tensors[place.name] = flat.view(place.shape)
    return Mapped(tensors, header.note)


def _map(fd: int, size: int) -> Any:
    """The memory as a ctypes array that unmaps it in the end. Python's mmap would hold a descriptor per mapping.

    Private: kernels before 6.7 refuse a shared mapping of write-sealed memory. Unwritten pages are shared anyway.
    """
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_POPULATE, fd, 0)
    if address in (None, _MAP_FAILED):
        raise OSError(ctypes.get_errno(), f"cannot map {size} bytes of weights")
    pages = _pages_type(size).from_address(address)
    weakref.finalize(pages, _libc.munmap, address, size).atexit = False  # at exit the kernel does it, after all threads
    return pages


@cache
def _pages_type(size: int) -> Any:
    return type("Pages", (ctypes.c_char * size,), {})  # a class of its own can be referred to weakly
