"""Memory shared between processes of this host: anonymous (`memfd_create`), handed over as a file descriptor.

It has no name, so nothing can be left behind in /dev/shm and no other user can open it; it goes when the last process
that maps it goes, however that process ends. The size is sealed: a peer cannot cut it short under our feet (SIGBUS).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import Literal

from membership.base.errors import QueueError

PAGE = mmap.PAGESIZE
IntFormat = Literal["b", "B", "h", "H", "i", "I", "q", "Q"]
_NO_MEMORY = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT, errno.EMFILE, errno.ENFILE)


class SegmentError(QueueError):
    """Shared memory could not be had (the message says how much was wanted) or is not what was expected."""


def _failed(what: str, error: OSError) -> Exception:
    if error.errno not in _NO_MEMORY:
        return error
    hint = "free memory, or raise the memory, file-size or open-files limit of this process (ulimit, container limits)"
    return SegmentError(f"{what}: {error.strerror}", hint=hint)


class Segment:
    """A mapped memfd. Python reads and writes through `view`; libc gets `address + offset`."""

    def __init__(self, fd: int, size: int, *, owned: bool) -> None:
        self.size = size
        try:
            self.map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise _failed(f"cannot map {size} bytes of shared memory", error) from error
        self._fd = os.dup(fd) if owned else -1
        self._anchor = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._anchor)
        self._views: list[memoryview[int]] = []
        self._closed = False

    @classmethod
    def create(cls, size: int, name: str = "elastic-ep") -> Segment:
        """A new zeroed segment of at least `size` bytes (whole pages). Pages take memory when first touched."""
        size = -(-size // PAGE) * PAGE
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise _failed("cannot create shared memory", error) from error
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, size, owned=True)
        except OSError as error:
            raise _failed(f"cannot get {size} bytes of shared memory", error) from error
        finally:
            os.close(fd)

    @classmethod
    def fill(cls, fd: int, size: int) -> Segment:
        """Give an empty memfd of another process its size, for good, and map it. `fd` stays the caller's.

        A second time with the same size maps it again.
        """
        try:
            if (before := os.fstat(fd).st_size) not in (0, size):
                raise SegmentError(f"this memory has {before} bytes, not {size}")
            if not before:
                os.ftruncate(fd, size)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as error:
            raise _failed(f"cannot get {size} bytes of shared memory", error) from error
        return cls(fd, size, owned=False)

    @classmethod
    def attach(cls, fd: int, at_least: int = 0) -> Segment:
        """Map a segment that another process made. `fd` stays the caller's, who may close it afterwards."""
        size = os.fstat(fd).st_size
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if size < max(at_least, 1) or not seals & fcntl.F_SEAL_SHRINK:
            raise SegmentError(f"not a sealed segment of at least {at_least} bytes ({size} bytes, seals {seals:#x})")
        return cls(fd, size, owned=False)

    def fileno(self) -> int:
        """The descriptor to hand over; only the segment's maker has it, and it stays this segment's."""
        if self._fd < 0:
            raise SegmentError("a closed or attached segment has no descriptor to hand over")
        return self._fd

    def view(self, offset: int = 0, nbytes: int | None = None, format: IntFormat = "B") -> memoryview[int]:
        """Writable view of part of the segment as items of `format` (struct codes). Valid until `close`."""
        end = self.size if nbytes is None else offset + nbytes
        view = memoryview(self.map)[offset:end].cast(format)
        self._views.append(view)
        return view

    def reserve(self, offset: int, nbytes: int) -> None:
        """Take the memory now, so that a lack of it is an error here and not a SIGBUS at some later store."""
        try:
            os.posix_fallocate(self._fd, offset, nbytes)
        except OSError as error:
            raise _failed(f"cannot get {nbytes} bytes of shared memory", error) from error

    def punch(self, offset: int, nbytes: int) -> None:
        """Give the memory of this part back; it reads as zeros afterwards."""
        self.map.madvise(mmap.MADV_REMOVE, offset, nbytes)

    def close(self) -> None:
        """Unmap. While a view of the map itself is in use, the memory stays."""
        if self._closed:
            return
        self._closed = True
        for view in self._views:
            view.release()
        self._views.clear()
        del self._anchor
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        try:
            self.map.close()
        except BufferError:
            del self.map  # a zero-copy view is in use: its death unmaps

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
