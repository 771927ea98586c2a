"""A rank process's surroundings: its title, frozen environment, signals, parallel groups, and its allocator."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType, MappingProxyType

import setproctitle

from membership.base.logs import PrefixedStream

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_BYTES = 128 << 20  # of freed memory: more than a step of 512 tokens takes for what lies between its operations
LARGEST_KEPT_BYTES = 32 << 20  # the most that every glibc takes


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


def give_memory_back() -> None:
    """After a load: what it has freed goes back to the kernel. The allocator would keep it for ever."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def keep_for_steps() -> None:
    """From now on, what a step frees is kept for the next one.

    By its own rule the allocator gives freed memory back that is more than twice the largest piece that there was. A
    step of a prompt takes and frees several such pieces at each layer: 100,000 page faults, a tenth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
