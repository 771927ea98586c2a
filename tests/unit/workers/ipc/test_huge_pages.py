"""Huge pages: the kernel really gives them to whoever maps the memory, and where it does not only time is lost."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workers.ipc import huge_pages
from workers.ipc.huge_pages import HUGE, map_private, map_shared

pytestmark = pytest.mark.unit
SIZE = 3 * HUGE + 5000  # the rest is too small for a huge page
TURNED_OFF = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
SEAL = fcntl.F_SEAL_WRITE


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
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


@pytest.mark.skipif(
    not TURNED_OFF.exists() or "[deny]" in TURNED_OFF.read_text(encoding="ascii"),
    reason="this kernel has no huge pages for shared memory",
)
def test_who_maps_the_memory_later_has_huge_pages_of_it_too(memory: int) -> None:
    written = map_shared(memory, SIZE)
    ctypes.memset(written, 7, SIZE)
    assert huge_bytes(written) == 3 * HUGE

    read = map_private(memory, SIZE)

    assert huge_bytes(read) == 3 * HUGE
    assert bytes(read) == b"\7" * SIZE


def test_without_huge_pages_the_memory_is_there_all_the_same(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_COLLAPSE", 9999)  # as for a kernel that does not know it
    written = map_shared(memory, SIZE)
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
    before = len(Path("/proc/self/maps").read_text(encoding="ascii").splitlines())
    del read
    assert len(Path("/proc/self/maps").read_text(encoding="ascii").splitlines()) == before - 1


def test_what_cannot_be_mapped_leaves_no_hole_behind() -> None:
    before = Path("/proc/self/maps").read_text(encoding="ascii")
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match=f"cannot map {SIZE} bytes"):
            map_private(reader, SIZE)
    finally:
        os.close(reader)
        os.close(writer)
    assert Path("/proc/self/maps").read_text(encoding="ascii") == before
