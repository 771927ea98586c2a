"""What /proc says about another process of this host."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PF_EXITING = 0x4
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Fields of /proc/<pid>/stat after the process's name.
_STATE, _GROUP, _FLAGS, _UTIME, _STIME, _BORN = 0, 2, 6, 11, 12, 19


def is_dying(pid: int) -> bool:
    """Whether the process has begun to exit (or is gone), which the kernel shows long before it closes its files.

    False for a pid of another namespace (0): then only the end of the connection shows it.
    """
    if pid == 0:
        return False
    try:
        fields = _fields(Path(f"/proc/{pid}/stat"))
    except OSError:  # no descriptor to be had: nothing is known
        return False
    return fields is None or fields[_STATE] in ("Z", "X") or bool(int(fields[_FLAGS]) & _PF_EXITING)


def of_group(group: int) -> list[int]:
    """The processes of a process group, as far as there are descriptors to look with. Also those that are ending."""
    found = []
    with suppress(OSError):
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            fields = _fields(Path(f"/proc/{pid}/stat"))
            if fields is not None and int(fields[_GROUP]) == group:
                found.append(pid)
    return found


def ended(pid: int, timeout_s: float) -> bool:
    """Wait for the end of a process, which need not be a child; whether it came in time."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:  # no descriptor to be had: nothing is known
        return False
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)


def start_time(pid: int) -> str | None:
    """When it was started, in the kernel's ticks: with its pid, this means one process only. None if it is gone."""
    fields = _fields(Path(f"/proc/{pid}/stat"))
    return fields[_BORN] if fields else None


def command_words(pid: int) -> list[str]:
    """The words of its command line; none if it is gone, a zombie, or about to become another program (exec).

    A title is one argument, perhaps padded: it is split.
    """
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
    if not line:
        return []
    parts = line.split(b"\0")
    return os.fsdecode(b"\0".join(parts[0].split(b" ") if len(parts) == 1 else parts)).split("\0")


@dataclass(frozen=True)
class Threads:
    """What the threads of a process are doing."""

    state: str  # of the main thread: R running, S sleeping, D waiting for a disk, T stopped, ...
    main_s: float  # processor time of the main thread
    all_s: float  # of all threads
    others_run: bool  # whether another thread runs, is runnable, or waits for a disk


def threads(pid: int) -> Threads | None:
    """Look at the threads of a process of this host; None if it is gone, or there is no descriptor to look with."""
    try:
        tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        seen = {task: _task(pid, task) for task in tasks}
    except OSError:
        return None
    main = seen.pop(pid, None)
    if main is None:
        return None
    all_s = main[1] + sum(used_s for _, used_s in seen.values())
    return Threads(main[0], main[1], all_s, any(state in "RD" for state, _ in seen.values()))


def is_stopped(pid: int) -> bool:
    """Whether each of its threads is stopped: SIGSTOP stops them one by one. False if it is gone."""
    try:
        tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return all(_task(pid, task)[0] in "TtX" for task in tasks)


def _task(pid: int, task: int) -> tuple[str, float]:
    """State and processor time of a thread; one that has ended meanwhile counts as dead."""
    fields = _fields(Path(f"/proc/{pid}/task/{task}/stat"))
    return (fields[_STATE], (int(fields[_UTIME]) + int(fields[_STIME])) * _TICK_S) if fields else ("X", 0.0)


def _fields(stat: Path) -> list[str] | None:
    """The fields after the name, which may hold anything; None if the process or thread is gone."""
    try:
        return stat.read_bytes().rpartition(b") ")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        return None
