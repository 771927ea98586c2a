"""The bare futex: what the transports that are compared with the queue's sleep on."""

from __future__ import annotations

import ctypes
import errno
import platform

from workers.ipc.futex import SLOW, Timespec

SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine(), 0)
FUTEX_WAIT, FUTEX_WAKE = 0, 1
_P, _U = ctypes.c_void_p, ctypes.c_uint
_syscall = SLOW.syscall
_syscall.argtypes = (ctypes.c_long, _P, ctypes.c_int, _U, ctypes.POINTER(Timespec), _P, _U)
_syscall.restype = ctypes.c_int


def futex_wait(address: int, expected: int, timeout_s: float) -> bool:
    """Sleep while the 32-bit word is `expected`; False at the deadline."""
    until = Timespec.of(timeout_s)
    if _syscall(SYS_FUTEX, address, FUTEX_WAIT, expected, ctypes.byref(until), None, 0) == 0:
        return True
    return ctypes.get_errno() != errno.ETIMEDOUT


def futex_wake(address: int, count: int = 2**31 - 1) -> int:
    """Wake up to `count` waiters; how many there were."""
    return int(_syscall(SYS_FUTEX, address, FUTEX_WAKE, count, None, None, 0))
