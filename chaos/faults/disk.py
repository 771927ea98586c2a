"""A full disk: ballast in a small file system that was mounted for it, never on a disk that others use.

`small_disk` mounts one for a state directory (needs root). A cluster started under `OWN_SHM` has a /dev/shm of its own,
which no other process sees; it is reached through /proc.
"""

from __future__ import annotations

import errno
import os
import subprocess
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.faults.base import Faults, NotInjected, SiteInjector

SMALL_BYTES = 1 << 30  # a larger file system may hold the data of others, and is not filled
CHUNK = 1 << 20
OWN_SHM = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "own-shm")

FAULTS = Faults()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of this size, mounted at `folder` inside the block; NotInjected without the right to mount."""
    folder.mkdir(parents=True, exist_ok=True)
    _run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "elastic-ep-chaos", str(folder)])
    try:
        yield
    finally:
        _run(["umount", str(folder)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, timeout=10.0, check=False, encoding="utf-8")
    if done.returncode:
        raise NotInjected(f"`{' '.join(command)}` failed: {done.stderr.strip()}", hint="a small disk needs root")


class Full(SiteInjector):
    """Ballast that leaves no byte free in the file system that a subclass names."""

    _folder = Path()

    @abstractmethod
    def folder(self) -> Path:
        """The root of the small file system."""

    def _prepare(self) -> None:
        self._folder = folder = self.folder()
        room = os.statvfs(folder)
        if not os.path.ismount(folder) or room.f_blocks * room.f_frsize > SMALL_BYTES:
            hint = "mount one: chaos.faults.disk.small_disk"
            raise NotInjected(f"{folder} is no small file system of its own", hint=hint)

    def _inject(self) -> str:
        size = _fill(self._ballast)
        probe = self._folder / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(b"x")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return f"{size} bytes of ballast; the next write fails with ENOSPC"
            raise
        finally:
            probe.unlink(missing_ok=True)
        raise NotInjected(f"{self._folder} still takes another file")

    def _heal(self) -> None:
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self._folder / f".ballast-{os.getpid()}"


def _fill(ballast: Path) -> int:
    """Write until nothing more fits; returns the number of bytes written."""
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    written, size = 0, CHUNK
    try:
        while size:
            try:
                written += os.write(fd, bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
    finally:
        os.close(fd)
    return written


@FAULTS.entry(
    "disk-full", "the state directory's disk is full", victims=("state-dir",), heals=True,
    needs=("root", "a small disk under the state directory"),
)  # fmt: skip
class DiskFull(Full):
    """The disk of the state directory: etcd's data, the history, the logs."""

    def folder(self) -> Path:
        """The mount point of the state directory's file system: the directory itself or one above it."""
        folder = self.site.state_dir().resolve()
        while not os.path.ismount(folder):
            folder = folder.parent
        return folder


@FAULTS.entry(
    "shm-full", "the cluster's own /dev/shm is full", victims=("shm",), heals=True, needs=("root", "mount namespaces")
)
class ShmFull(Full):
    """The cluster's own /dev/shm."""

    def folder(self) -> Path:
        """The one that the supervisor sees; NotInjected if it is the machine's."""
        pid = self.site.pid("supervisor")
        if os.stat(f"/proc/{pid}/ns/mnt") == os.stat("/proc/self/ns/mnt"):
            raise NotInjected("the cluster has the machine's /dev/shm", hint="start it under chaos.faults.disk.OWN_SHM")
        return Path(f"/proc/{pid}/root/dev/shm")
