"""Measurements of this host's kernels on disk, so that the next start need not measure: that takes seconds to minutes.

By CPU, code (ours, torch's), threads and the model's config: what was measured for anything else is another file. A
file that is damaged, or that another user could have written, is as good as none, as is a disk that cannot be written:
a rank then measures. Ranks that write at the same time each put a whole file in place; the last one stays.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec
import structlog

ENV = "ELASTIC_CACHE_DIR"
FOLDER = "calibrations"
MAX_BYTES = 1 << 20
CPU_LINES = ("vendor_id", "model name", "stepping", "microcode", "flags", "CPU implementer", "CPU part", "Features")
Known = dict[str, tuple[int, ...]]

log = structlog.get_logger(__name__)


class _File(msgspec.Struct, frozen=True):
    key: str
    known: Known
    digest: str  # of the two


def _digest(key: str, known: Mapping[str, tuple[int, ...]]) -> str:
    return hashlib.sha256(msgspec.json.encode([key, sorted(known.items())])).hexdigest()


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


@cache
def cpu() -> str:
    """The kind of this machine's first processor, with its features."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        return "\n".join(line for line in first.splitlines() if line.split("\t")[0].strip() in CPU_LINES)
    return ""


class KeptCalibrations:
    """One file: what is known for `key`. Safe against other processes of any user."""

    def __init__(self, key: str, directory: Path | None = None) -> None:
        self._key = f"{cpu()}\n{key}"
        self._directory = directory or cache_dir()
        self._name = hashlib.sha256(self._key.encode()).hexdigest()[:32] + ".json"

    def load(self) -> Known:
        """What was measured before; empty if that is unknown or not to be trusted."""
        with suppress(OSError, msgspec.MsgspecError, ValueError):
            folder = self._folder()
            fd = os.open(folder / self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC) if folder is not None else -1
            if fd < 0:
                return {}
            with open(fd, "rb") as opened:
                if not _ours(os.fstat(fd), stat.S_ISREG):
                    return {}
                found = msgspec.json.decode(opened.read(MAX_BYTES), type=_File)
            if found.key == self._key and found.digest == _digest(found.key, found.known):
                return found.known
        return {}

    def save(self, known: Mapping[str, tuple[int, ...]]) -> None:
        """Keep this too."""
        try:
            folder = self._folder()
            if folder is None:
                return
            both = {**self.load(), **known}
            made = msgspec.json.encode(_File(self._key, both, _digest(self._key, both)))
            temporary = folder / f".{secrets.token_hex(8)}"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with open(fd, "wb") as opened:
                    opened.write(made)
                os.replace(temporary, folder / self._name)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            log.info("calibration_not_kept", error=str(error))

    def _folder(self) -> Path | None:
        """The directory, made if it is missing; None if another user could write there."""
        if self._directory is None:
            return None
        folder = self._directory / FOLDER
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _ours(folder.lstat(), stat.S_ISDIR) else None


def _ours(found: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    return is_kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
