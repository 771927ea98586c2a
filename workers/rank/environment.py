"""A rank process's surroundings: its name for people, its frozen environment, the lock that a host's ranks share, its
signals and groups."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType, MappingProxyType

import setproctitle

from membership.base.errors import WaitTimeout
from membership.base.logs import PrefixedStream

LOCK_TIMEOUT_S = 600.0
LOCK_POLL_S = 0.02


def set_name(name: str) -> None:
    """Show `name` in the process title and before every line that this process prints."""
    setproctitle.setproctitle(f"elastic-ep::{name}")
    prefix = f"({name} pid={os.getpid()}) "
    for attribute in ("stdout", "stderr"):
        stream = getattr(sys, attribute)
        if isinstance(stream, PrefixedStream):
            stream.prefix = prefix
        elif stream is not None:
            setattr(sys, attribute, PrefixedStream(stream, prefix))


def frozen_environment() -> Mapping[str, str]:
    """The environment as it is now; later changes of `os.environ` do not show in it."""
    return MappingProxyType(dict(os.environ))


class HostLock:
    """A lock shared by all ranks of a host, for what they had better do one after the other.

    A file lock on an anonymous file: the kernel frees it when its holder dies, however it dies.
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
        """Let go of the file."""
        os.close(self._file)


def signals_end_it_once() -> threading.Event:
    """SIGTERM and SIGINT raise SystemExit in the main thread, the first time; during the shutdown they do nothing."""
    ending = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if ending.is_set():
            return
        ending.set()
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return ending


def destroy_parallel_groups() -> None:
    """Leave whatever groups a worker has joined with torch.distributed."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
