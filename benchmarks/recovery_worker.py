"""The product's worker with what `recovery.py` adds in a rank: ballast, and the switch of detection and masking."""

from __future__ import annotations

import mmap
import os

from benchmarks import recovery_switch
from workers.rank.worker import EPWorker


def ballast(megabytes: int) -> mmap.mmap:
    """Private memory of this size, each 4 KiB page of it touched, so that all of it has to be torn down."""
    memory = mmap.mmap(-1, megabytes << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    page = b"\1" * mmap.PAGESIZE
    for _ in range(len(memory) // mmap.PAGESIZE):
        memory.write(page)
    return memory


class BenchWorker(EPWorker):
    """See workers.rank.worker."""

    def load_model(self) -> None:
        """The model, and the ballast."""
        super().load_model()
        megabytes = int(os.environ.get("RECOVERY_BALLAST_MB") or 0)
        self._ballast = ballast(megabytes) if megabytes else None


recovery_switch.install()
