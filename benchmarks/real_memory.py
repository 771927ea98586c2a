"""Where a service's memory is: private, shared and file pages of each of its processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PARTS = {"Pss_Anon": "private", "Pss_Shmem": "shared", "Pss_File": "files"}  # of /proc/PID/smaps_rollup, in kB


def memory(pid: int) -> dict[str, Counter[str]]:
    """Bytes by process name and part, of a process and all below it. Pages that several map are shared out to them.

    What a descriptor alone keeps, mapped nowhere (a weight store between two loads), is in none.
    """
    found: dict[str, Counter[str]] = {}
    for each in _tree(pid):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
            name = Path(f"/proc/{each}/comm").read_text(encoding="utf-8").strip()
        except OSError:
            continue  # it has ended
        sizes = {key: 1024 * int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}
        found.setdefault(name, Counter()).update({said: sizes.get(part, 0) for part, said in PARTS.items()})
    return found


def available() -> int:
    """Bytes that programs may still take on this machine."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        below = [int(child) for task in tasks for child in (task / "children").read_text(encoding="utf-8").split()]
    except OSError:
        return
    for child in below:
        yield from _tree(child)
