"""What took long to find out, on disk for the next start: by a key that says what it is of. Only a cache.

A file that is damaged, or that another user could have written, is as good as none, as is a disk that cannot be
written: it is then found out again. Processes that write at the same time each put a whole file in place; the last one
stays.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

ENV = "ELASTIC_CACHE_DIR"
MAX_BYTES = 1 << 24
DIGEST_BYTES = 32

log = structlog.get_logger(__name__)


def cache_dir() -> Path | None:
    """ELASTIC_CACHE_DIR, or the user's own directory for caches; None if there is none."""
    if given := os.environ.get(ENV):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "elastic-ep"
    try:
        return Path.home() / ".cache" / "elastic-ep"
    except RuntimeError:  # a user without a home
        return None


class KeptFiles:
    """One folder of the cache. Safe against other processes of any user."""

    def __init__(self, folder: str, directory: Path | None = None) -> None:
        self._name, self._directory = folder, directory or cache_dir()

    def load(self, key: bytes) -> bytes | None:
        """What was kept for `key`; None if that is unknown or not to be trusted."""
        with suppress(OSError):
            folder = self._folder()
            if folder is None:
                return None
            fd = os.open(folder / _file_of(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as opened:
                if not _ours(os.fstat(fd), stat.S_ISREG):
                    return None
                found = opened.read(MAX_BYTES)
            if found[:DIGEST_BYTES] == _digest(key, found[DIGEST_BYTES:]):
                return found[DIGEST_BYTES:]
        return None

    def save(self, key: bytes, content: bytes) -> None:
        """Keep this, in place of what was."""
        try:
            folder = self._folder()
            if folder is None:
                return
            temporary = folder / f".{secrets.token_hex(8)}"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with open(fd, "wb") as opened:
                    opened.write(_digest(key, content) + content)
                os.replace(temporary, folder / _file_of(key))
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            log.info("not_kept", folder=self._name, error=str(error))

    def _folder(self) -> Path | None:
        """The directory, made if it is missing; None if another user could write there."""
        if self._directory is None:
            return None
        folder = self._directory / self._name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _ours(folder.lstat(), stat.S_ISDIR) else None


def _file_of(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()[:32]


def _digest(key: bytes, content: bytes) -> bytes:
    """Of the two: a file that was renamed is of no other key."""
    return hashlib.sha256(hashlib.sha256(key).digest() + content).digest()


def _ours(found: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    return is_kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
