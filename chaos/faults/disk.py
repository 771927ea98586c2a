"""A full disk: ballast in a small file system that was mounted for it, never on a disk that others use.

`small_disk` mounts one, for a state directory (needs root). A /dev/shm of its own is given to a cluster by starting it
under `OWN_SHM`; nobody else sees that one, and it is reached through /proc.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.faults.base import Injected, NotInjected, Site
from chaos.faults.fault import Fault, Params

SMALL_BYTES = 1 << 30  # a file system larger than this is somebody's, and is not filled
CHUNK = 1 << 20
OWN_SHM = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "own-shm")


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of so many MB at `folder` while the block lasts; NotInjected without the right to mount."""
    folder.mkdir(parents=True, exist_ok=True)
    _run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "elastic-ep-chaos", str(folder)])
    try:
        yield
    finally:
        _run(["umount", str(folder)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10.0, check=False)
    if done.returncode:
        raise NotInjected(f"`{' '.join(command)}` failed: {done.stderr.strip()}", hint="a small disk needs root")


class Full(ABC):
    """Ballast that leaves no byte free; a subclass says where."""

    name = ""

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        self.site, self.victim = site, victim
        self._ballast: Path | None = None

    @abstractmethod
    def folder(self) -> Path:
        """The root of the small file system."""

    def inject(self) -> Injected:
        """Fill it, and see that another file cannot be written."""
        folder = self.folder()
        room = os.statvfs(folder)
        if not os.path.ismount(folder) or room.f_blocks * room.f_frsize > SMALL_BYTES:
            raise NotInjected(
                f"{folder} is no small file system of its own", hint="mount one: chaos.faults.disk.small_disk"
            )
        at = time.time()
        self._ballast = folder / f".ballast-{os.getpid()}"
        try:
            size = _fill(self._ballast)
            self._see_full(folder)
        except BaseException:
            self.heal()
            raise
        return Injected(
            fault=self.name, victim=self.victim, at=at, seen_at=time.time(),
            proof=f"{size} bytes of ballast; the next write fails with ENOSPC",
        )  # fmt: skip

    def heal(self) -> None:
        """Take the ballast away."""
        if self._ballast is not None:
            self._ballast.unlink(missing_ok=True)
            self._ballast = None

    def _see_full(self, folder: Path) -> None:
        probe = folder / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(b"x")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return
            raise
        finally:
            probe.unlink(missing_ok=True)
        raise NotInjected(f"{folder} still takes another file")


def _fill(ballast: Path) -> int:
    """Write until nothing goes in any more; how much that was."""
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


class DiskFull(Full):
    """The disk of the state directory: etcd's data, the history, the logs."""

    name = "disk-full"

    def folder(self) -> Path:
        """Where the state directory's file system is mounted: the state directory itself or what holds it."""
        folder = self.site.state_dir().resolve()
        while not os.path.ismount(folder):
            folder = folder.parent
        return folder


class ShmFull(Full):
    """The cluster's own /dev/shm."""

    name = "shm-full"

    def folder(self) -> Path:
        """As the supervisor sees it; NotInjected if that is the machine's."""
        pid = self.site.pid("supervisor")
        if os.stat(f"/proc/{pid}/ns/mnt") == os.stat("/proc/self/ns/mnt"):
            raise NotInjected("the cluster has the machine's /dev/shm", hint="start it under chaos.faults.disk.OWN_SHM")
        return Path(f"/proc/{pid}/root/dev/shm")


FAULTS = {
    "disk-full": Fault(
        about="the state directory's disk is full", victims=("state-dir",), heals=True, make=DiskFull,
        needs=("root", "a small disk under the state directory"),
    ),
    "shm-full": Fault(
        about="the cluster's own /dev/shm is full", victims=("shm",), heals=True, make=ShmFull,
        needs=("root", "mount namespaces"),
    ),
}  # fmt: skip
