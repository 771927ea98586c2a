"""Files that grow for ever get a limit: what is full becomes `NAME.1`, what was that `NAME.2`, and the oldest goes.

Two ways. Where the writers are ours and open the file for each line (events), the file is renamed, under a lock that
they share: nothing is lost. Where a process holds the file open for good (the stderr of roles, ranks and etcd), its
content is copied and the file made empty: the writer never waits and need not know; what it writes between the two is
lost.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import structlog

MAX_FILES = 100
RENAME_S = 0.1  # a rename takes less, unless its process is stopped in the middle of it
MEGABYTE = 1 << 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Limit:
    """How large a file may grow, and how many earlier ones are kept."""

    max_bytes: int
    keep: int


def numbered(path: Path, number: int) -> Path:
    """The file's predecessor of that number."""
    return path.with_name(f"{path.name}.{number}")


@contextmanager
def appending(path: Path) -> Iterator[int]:
    """The file, opened to append to it under the shared lock. One that gets a successor meanwhile is opened again.

    The lock is not waited for long: a process that is stopped while it renames must stop no other. A file system
    without locks does without.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    until = time.monotonic() + RENAME_S
    while True:
        fd = os.open(path, flags, 0o600)
        try:
            if (_shared(fd) or time.monotonic() > until) and _is(path, fd):
                yield fd
                return
        finally:
            os.close(fd)
        time.sleep(0.0005)  # a lock can be waited for, but not with a deadline


def _shared(fd: int) -> bool:
    """Whether no process is renaming the file, nor will until it is closed here."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("file_not_locked", error=str(error))
    return True


def succeed(path: Path, limit: Limit) -> None:
    """Rename a file that is full, unless another process does, or writes right now: then the next event does it."""
    with ExitStack() as opened:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, fd) and os.fstat(fd).st_size >= limit.max_bytes:
                _shift(path, limit.keep)
                path.rename(numbered(path, 1)) if limit.keep else path.unlink()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("file_not_rotated", path=str(path), error=str(error))


def empty(path: Path, limit: Limit) -> bool:
    """Copy a file that is full to `NAME.1`, and make it empty under its writers. Whether it was full."""
    try:
        if path.stat().st_size < limit.max_bytes:
            return False
    except FileNotFoundError:
        return False
    if limit.keep:
        _shift(path, limit.keep)
        try:
            shutil.copyfile(path, numbered(path, 1))
        except OSError as error:  # the disk is full: the limit matters more than what was said
            log.warning("log_not_kept", path=str(path), error=str(error))
            numbered(path, 1).unlink(missing_ok=True)
    os.truncate(path, 0)
    return True


def kept(path: Path, opened: ExitStack) -> list[BinaryIO]:
    """The file and its predecessors, the newest first, each once.

    Files only move up, as this goes: none is missed. But a file may be met again, behind newer ones that came since:
    its place is where it was met last.
    """
    found: dict[tuple[int, int], BinaryIO] = {}
    for number in range(MAX_FILES):
        file = open_to_read(numbered(path, number) if number else path, opened)
        if file is not None:  # a number may be free for a moment, while files move up
            status = os.fstat(file.fileno())
            which = (status.st_dev, status.st_ino)
            found[which] = found.pop(which, file)
    return list(found.values())


def open_to_read(path: Path, opened: ExitStack) -> BinaryIO | None:
    """The file; None if there is none."""
    try:
        return opened.enter_context(path.open("rb"))
    except FileNotFoundError:
        return None


def _shift(path: Path, keep: int) -> None:
    """Free the name `NAME.1`; the file beyond `keep` goes."""
    numbers = [number for number in range(1, MAX_FILES) if numbered(path, number).exists()]
    for number in reversed(numbers):
        if number >= keep:
            numbered(path, number).unlink(missing_ok=True)
        else:
            numbered(path, number).rename(numbered(path, number + 1))


def _is(path: Path, fd: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
