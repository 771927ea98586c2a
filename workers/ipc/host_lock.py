"""A lock shared by all ranks of a host, for work that they should do one after the other."""

from __future__ import annotations

import fcntl
import os
import threading
import time

from membership.base.errors import WaitTimeout

LOCK_TIMEOUT_S = 600.0
LOCK_POLL_S = 0.02


class HostLock:
    """A file lock on an anonymous file: the kernel frees it when its holder dies, however it dies.

    A wait for it ends with WaitTimeout.
    """

    def __init__(self, fd: int, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._file = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # an open file of our own: locks belong to those
        self._timeout_s = timeout_s

    @staticmethod
    def create() -> int:
        """A descriptor to pass to the ranks."""
        return os.memfd_create("elastic-ep-host-lock", os.MFD_CLOEXEC)

    def __enter__(self) -> HostLock:
        deadline = time.monotonic() + self._timeout_s
        pause = threading.Event()
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WaitTimeout(f"another rank has held the host lock for {self._timeout_s:g} s") from None
                pause.wait(LOCK_POLL_S)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file, which also unlocks it."""
        os.close(self._file)
