"""A /dev/shm of this process and its children alone, so that the leak check sees only what they left there.

Other tests run beside, and so does the simulation of faults, whose pool of processes has its semaphores there.
"""

from __future__ import annotations

import ctypes

CLONE_NEWNS = 0x00020000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
FOLDER = b"/dev/shm"


def take_own_shm() -> bool:
    """Mount an empty one in a mount namespace of the calling thread, which later threads and children inherit.

    False without the right to do so: then it is shared with the machine as before.
    """
    libc = ctypes.CDLL(None)
    return not (
        libc.unshare(CLONE_NEWNS)
        or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
        or libc.mount(b"tmpfs", FOLDER, b"tmpfs", 0, None)
    )
