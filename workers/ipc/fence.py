"""A memory fence: what was stored or read before it stays before what follows, for every process that maps the memory.

Messages in shared memory are published by one word stored last. On x86-64 stores and loads keep that order by
themselves; elsewhere the two locked instructions of a private semaphore enforce it.
"""

from __future__ import annotations

import ctypes
import platform

from workers.ipc import futex

_KEEPS_ORDER = platform.machine() == "x86_64"
_SCRATCH = (ctypes.c_char * futex.SEM_BYTES)()
_ADDRESS = ctypes.addressof(_SCRATCH)
futex.sem_init(_ADDRESS)


def fence() -> None:
    """Order stores before stores and loads before loads."""
    if not _KEEPS_ORDER:
        futex.sem_post(_ADDRESS)
        futex.sem_trywait(_ADDRESS)
