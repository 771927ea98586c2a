"""How the kernel shares cores among our processes, where they are fewer than our threads. Needs no privilege."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import structlog

SLICE_US = 100
"""The shortest that the kernel grants."""
LOW_NICE = 10
"""About a tenth of the share of the others; the lowest (19) would be next to nothing on a busy machine."""
_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # "quota period" of the container, or "max period"
CORES = "ELASTIC_CORES"
"""Environment: the most cores that this host's ranks share; of a pod without a limit, say, those it asked for."""

log = structlog.get_logger(__name__)


class _SchedAttr(ctypes.Structure):
    """struct sched_attr of sched_setattr(2), its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64), ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64), ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )  # fmt: skip


def run_in_short_turns(slice_us: int = SLICE_US) -> bool:
    """Ask for short turns for this thread and the threads and processes that it starts; False if the kernel refuses.

    A thread with short turns runs sooner after it wakes: roles and etcd then do not wait for the end of a computing
    rank's turn. Its share of the cores stays the same. Kernels before 6.12 take no notice.
    """
    return _ask_for(slice_us)


def run_in_usual_turns() -> bool:
    """Undo what a parent asked for: this process computes."""
    return _ask_for(0)


def _ask_for(slice_us: int) -> bool:
    number = _SYS_SCHED_SETATTR.get(platform.machine())
    if number is None:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _SchedAttr(size=ctypes.sizeof(_SchedAttr), nice=nice, runtime=slice_us * 1000)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, 0, ctypes.byref(attributes), 0):
        log.info("short_turns_unavailable", error=os.strerror(ctypes.get_errno()))
        return False
    return True


def at_low_priority() -> None:
    """Give this thread a low priority for the rest of its life: without privilege, it cannot be raised again."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_NICE)


@cache
def usable_cores() -> int:
    """How many cores this process may use, by its affinity, its container's limit and its environment."""
    cores = len(os.sched_getaffinity(0))
    if (given := os.environ.get(CORES, "")).isdecimal() and int(given):
        cores = min(cores, int(given))
    with suppress(OSError, ValueError):  # no such file, or no limit in it
        quota, period = map(int, CPU_MAX.read_text(encoding="ascii").split())
        cores = min(cores, max(1, quota // period))
    return cores
