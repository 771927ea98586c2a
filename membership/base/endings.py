"""How a process ended, in words: its signal, and the OOM killer's part in it, since a SIGKILL has no sender.

The memory cgroup counts the processes that it lost to the OOM killer. Only an agent or a supervisor in the cgroup of
what died can know: of another cgroup nothing is counted here.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OUT_OF_MEMORY = "out of memory"
MEMORY_HINT = "raise the memory limit (of a pod: resources.limits.memory), or have fewer ranks: elastic scale N"


def signal_name(number: int) -> str:
    """Also of those that have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def suspicion(status: int, kills: int | None) -> str:
    """What to add to how a process ended. `kills`: of the OOM killer since the last such death; None: not known."""
    if status != -signal.SIGKILL or kills == 0:
        return ""
    return " (perhaps the OOM killer: see dmesg)" if kills is None else f", {OUT_OF_MEMORY} (cgroup oom_kill {kills})"


def counted(mine: str, read: Callable[[Path], str]) -> int | None:
    """What the memory cgroup (version 2 or 1) has counted so far; None: it does not say. `mine`: /proc/self/cgroup."""
    for line in mine.splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, file = (CGROUPS / "memory", "memory.oom_control") if kinds else (CGROUPS, "memory.events")
        for folder in (root / path.lstrip("/"), root):  # a container may see its own group as the root
            try:
                counts = dict(row.split() for row in read(folder / file).splitlines())
                return int(counts["oom_kill"])
            except (OSError, KeyError, ValueError):
                continue
    return None


def kills_so_far() -> int | None:
    """Of the cgroup that this process is in."""
    try:
        mine = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return None
    return counted(mine, lambda file: file.read_text(encoding="utf-8"))


class OomKills:
    """How many kills are not yet explained by a death that was seen."""

    def __init__(self, so_far: Callable[[], int | None] = kills_so_far) -> None:
        self._so_far = so_far
        self._explained = so_far()

    def of_a_death(self, status: int) -> str:
        """What to add to how a process ended that just did."""
        if status != -signal.SIGKILL:
            return ""
        now = self._so_far()
        if now is None or self._explained is None:
            return suspicion(status, None)
        kills = now - self._explained
        self._explained = min(now, self._explained + 1)  # several may die at once
        return suspicion(status, kills)
