"""The weight files of a checkpoint: opened once, read by slices, straight to where the weights shall be.

All files are opened at once, as long as they are what their stamps say: files that are replaced later are read from all
the same, as they were. One that is overwritten in place is noticed before and after each read (by size and time of
change), and one that is cut short by its end. What is not noticed: an overwritten file whose time was set back. It
serves no wrong rows: weights are compared by content afterwards.

Files are read, not mapped: page faults take twice the time, and hold the interpreter's lock while a disk is slow. The
checksum is made of each piece while it is in the processor's cache.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from contextlib import ExitStack, suppress
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from membership.base.errors import ModelError
from workers.model.content import FileStamp, Stamps, changed
from workers.model.families import INDEX_FILE, SINGLE_FILE, weight_files
from workers.protocol.load_progress import LoadProgress

PIECE = 1 << 20  # bytes per read: small enough for the cache
MAX_HEADER = 100_000_000  # bytes, as safetensors has it
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Stored(NamedTuple):
    """Where a tensor, or part of one, is: `nbytes` at `offset` in `file`."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """Reads tensors by name, of files in the state that `stamps` describe. Safe to use from several threads."""

    def __init__(self, root: str | Path, stamps: Stamps, progress: LoadProgress | None = None) -> None:
        self._progress = progress or LoadProgress()
        self._root, self._stamps = Path(root), stamps
        self._fds: dict[str, int] = {}
        self._places: dict[str, dict[str, Stored]] = {}
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self.bytes_read = 0
        for file in stamps:
            if file.endswith(".safetensors"):
                self._keep(file)

    def _keep(self, file: str) -> None:
        with suppress(OSError):  # it is gone: reading from it reports that
            self._fds[file] = fd = os.open(self._root / file, os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, fd)

    @cached_property
    def _file_of(self) -> dict[str, str]:
        if INDEX_FILE not in self._stamps:
            return dict.fromkeys(self._places_in(SINGLE_FILE), SINGLE_FILE)
        found = weight_files(self._root)
        with suppress(OSError):
            if FileStamp.of((self._root / INDEX_FILE).stat()) == self._stamps[INDEX_FILE]:
                return found
        raise changed(self._root, [INDEX_FILE])

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return sorted(self._file_of)

    def stored(self, name: str, index: int | None = None) -> Stored:
        """Where a tensor is, or entry `index` along its first axis. ModelError: its file has changed."""
        places = self._places_in(self._file_of[name])
        if name not in places:
            raise ModelError(f"{self._file_of[name]} has no tensor {name}", hint="is the checkpoint complete?")
        found = places[name]
        if index is None:
            return found
        size = found.nbytes // found.shape[0]
        return found._replace(shape=found.shape[1:], offset=found.offset + index * size, nbytes=size)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A private copy of a tensor, or of entry `index` along its first axis. ModelError: its file has changed."""
        stored = self.stored(name, index)
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into(stored, memory_of(tensor))
        return tensor

    def read_into(self, stored: Stored, room: memoryview, checksum: int = 0) -> int:
        """Read it there; the CRC-32 of its bytes, after those of `checksum`. ModelError: its file has changed."""
        self._require(stored.file)
        fd, done = self._fds[stored.file], 0
        while done < stored.nbytes:
            piece = room[done : min(done + PIECE, stored.nbytes)]
            got = os.preadv(fd, [piece], stored.offset + done)
            if not got:
                raise changed(self._root, [stored.file])
            checksum = zlib.crc32(piece[:got], checksum)
            done += got
            self._progress.mark()
        with self._lock:
            self.bytes_read += done
        self._require(stored.file)
        return checksum

    def _places_in(self, file: str) -> dict[str, Stored]:
        with self._lock:
            if file not in self._places:
                self._require(file)
                try:
                    self._places[file] = _places(file, self._fds[file])
                except (ValueError, KeyError, TypeError, struct.error) as error:
                    raise ModelError(f"{self._root / file} is no safetensors file: {error!r}") from error
            return self._places[file]

    def _require(self, file: str) -> None:
        fd = self._fds.get(file)
        if fd is None or FileStamp.of(os.fstat(fd)) != self._stamps[file]:
            raise changed(self._root, [file])

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._fds.clear()
            self._stack.close()


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _places(file: str, fd: int) -> dict[str, Stored]:
    """The header of a safetensors file: where each tensor is. ValueError and others: it is none."""
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    start, size = 8 + length, os.fstat(fd).st_size
    found = {}
    for name, entry in json.loads(os.pread(fd, length, 8)).items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if end - begin != prod(shape) * dtype.itemsize or begin < 0 or start + end > size:
            raise ValueError(f"{name} does not fit its place")
        found[name] = Stored(file, dtype, shape, start + begin, end - begin)
    return found
