"""Large read-mostly shared memory in pages of 2 MB instead of 4 kB: weights, which each process of a host maps.

With 4 kB a model of 3 GB is 700 thousand pages: 0.2 s of the processor whenever a process maps them, as much when it
ends, seconds where they are filled; and what walks through them, as products do, stalls at the end of each page. By
default the kernel gives no huge pages to shared memory by itself, but does so when asked for them page by page
(`MADV_COLLAPSE`, Linux 6.1). A kernel or a memory that has none gives 4 kB ones: only time is lost.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache
from typing import Any

import structlog

HUGE = 2 << 20
_AT_ONCE = 32 * HUGE  # asked for in one call, so that a memory in pieces is noticed before much time is lost
_COLLAPSE = 25  # MADV_COLLAPSE, which Python's mmap does not name
_NONE, _FIXED = 0, 0x10  # PROT_NONE, MAP_FIXED
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
log = structlog.get_logger(__name__)


def map_shared(fd: int, size: int) -> Any:
    """Map an empty memfd of that size, all of which is to be written; the ctypes array unmaps it in the end. OSError.

    If they can be had, its pages are huge from now on, for every process that maps it with these two.
    """
    pages = _mapped(fd, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
    _collapse(fd, ctypes.addressof(pages), size // HUGE * HUGE)
    return pages


def map_private(fd: int, size: int) -> Any:
    """Map it read-only, all of it present. OSError.

    Python's mmap would hold a descriptor per mapping. Private: kernels before 6.7 refuse a shared mapping of
    write-sealed memory. Unwritten pages are shared anyway.
    """
    return _mapped(fd, size, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_POPULATE)


def _mapped(fd: int, size: int, protection: int, flags: int) -> Any:
    """At a multiple of HUGE: elsewhere huge pages are mapped as small ones."""
    room = size + HUGE
    start = _check(_libc.mmap(None, room, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0), size)
    address = -(-start // HUGE) * HUGE
    try:
        _check(_libc.mmap(address, size, protection, flags | _FIXED, fd, 0), size)
    except OSError:
        _libc.munmap(start, room)
        raise
    page = mmap.PAGESIZE
    end = address + -(-size // page) * page
    for first, beyond in ((start, address), (end, start + room)):
        if beyond > first:
            _libc.munmap(first, beyond - first)
    pages = _pages_type(size).from_address(address)
    weakref.finalize(pages, _libc.munmap, address, size).atexit = False  # at exit the kernel does it, after all threads
    return pages


def _check(address: int | None, size: int) -> int:
    if address is None or address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"cannot map {size} bytes")
    return address


@cache
def _pages_type(size: int) -> Any:
    return type("Pages", (ctypes.c_char * size,), {})  # a class of its own can be referred to weakly


def _collapse(fd: int, address: int, size: int) -> None:
    """One byte of each page is written first: the kernel does not look where nothing is at all. OSError: no memory."""
    for first in range(0, size, _AT_ONCE):
        end = min(first + _AT_ONCE, size)
        for page in range(first, end, HUGE):
            os.pwrite(fd, b"\0", page)  # not through the mapping, where a lack of memory is a SIGBUS
        if _libc.madvise(address + first, end - first, _COLLAPSE):
            _say_none(os.strerror(ctypes.get_errno()))
            return


@cache
def _say_none(reason: str) -> None:
    """Once, as a large model is hundreds of such memories."""
    log.info("no_huge_pages", reason=reason)
