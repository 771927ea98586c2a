"""Huge pages: the kernel really gives them to whoever maps the memory, and where it does not only time is lost."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from workers.ipc import huge_pages
from workers.ipc.huge_pages import HUGE, map_private, map_shared

pytestmark = pytest.mark.unit
SIZE = 3 * HUGE + 5000  # the rest is too small for a huge page
MADV_COLLAPSE = 25
SEAL = fcntl.F_SEAL_WRITE
NAME = f"huge-pages-{os.getpid()}"


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def huge_bytes(pages: Any) -> int:
    """How much of what is mapped there is mapped as huge pages."""
    address, found, inside = ctypes.addressof(pages), 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        key, *values = line.split()
        if "-" in key and not key.endswith(":"):
            start, end = (int(part, 16) for part in key.split("-"))
            inside = start <= address < end
        elif inside and key == "ShmemPmdMapped:":
            found += 1024 * int(values[0])
    return found


@pytest.fixture
def huge() -> None:
    """Skip where the kernel gives none: an older one, a memory in pieces, or it is turned off."""
    fd = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SIZE)
        os.pwrite(fd, bytes(SIZE), 0)
        pages = huge_pages._mapped(fd, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
    finally:
        os.close(fd)
    assert ctypes.addressof(pages) % HUGE == 0, "or it would refuse it everywhere"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.madvise(ctypes.addressof(pages), 3 * HUGE, MADV_COLLAPSE):
        pytest.skip(f"no huge pages for shared memory: {os.strerror(ctypes.get_errno())}")


@pytest.mark.usefixtures("huge")
def test_who_maps_the_memory_later_has_huge_pages_of_it_too(memory: int) -> None:
    written = map_shared(memory, SIZE)
    ctypes.memset(written, 7, SIZE)
    assert huge_bytes(written) == 3 * HUGE

    read = map_private(memory, SIZE)

    assert huge_bytes(read) == 3 * HUGE
    assert bytes(read) == b"\7" * SIZE


def test_without_huge_pages_the_memory_is_there_all_the_same(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_COLLAPSE", 9999)  # as for a kernel that does not know it
    huge_pages._say_none.cache_clear()
    with capture_logs() as logged:
        written = map_shared(memory, SIZE)
        map_shared(memory, SIZE)
    assert [line["event"] for line in logged] == ["no_huge_pages"], "not for each part of a model"
    assert bytes(written) == bytes(SIZE)
    ctypes.memset(written, 7, SIZE)
    assert huge_bytes(written) == 0
    assert bytes(map_private(memory, SIZE)) == b"\7" * SIZE


def test_the_mapping_ends_with_the_array(memory: int) -> None:
    written = map_shared(memory, SIZE)
    with pytest.raises(OSError, match="busy"):
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEAL)
    del written
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEAL)
    read = map_private(memory, SIZE)
    address = ctypes.addressof(read)
    assert mapped_at(address) == [f"/memfd:{NAME} (deleted)"]
    del read
    assert f"/memfd:{NAME} (deleted)" not in mapped_at(address)


def mapped_at(start: int, end: int = 0) -> list[str]:
    """What is mapped in this range, or at this address: the names, or the permissions of what has none."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        where, permissions, _, _, _, *name = line.split(maxsplit=5)
        first, beyond = (int(part, 16) for part in where.split("-"))
        if first < max(end, start + 1) and start < beyond:
            found.append(name[0] if name else permissions)
    return found


def test_what_cannot_be_mapped_leaves_no_hole_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    check = huge_pages._check

    def seen(address: int | None, size: int) -> int:
        reserved.append(check(address, size))
        return reserved[-1]

    monkeypatch.setattr(huge_pages, "_check", seen)
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match=f"cannot map {SIZE} bytes"):
            map_private(reader, SIZE)
    finally:
        os.close(reader)
        os.close(writer)
    (start,) = reserved
    assert "---p" not in mapped_at(start, start + SIZE + HUGE)
