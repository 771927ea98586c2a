"""What /proc says about another process of this host."""

from __future__ import annotations

from pathlib import Path

_PF_EXITING = 0x4
_STATE, _FLAGS = 0, 6  # fields of /proc/<pid>/stat behind the process's name


def is_dying(pid: int) -> bool:
    """Whether the process has begun to exit (or is gone), which the kernel shows long before it closes its files.

    False for pids of another namespace (0): then only the end of the link tells.
    """
    if pid == 0:
        return False
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    fields = stat[stat.rindex(b")") + 2 :].split()
    return fields[_STATE] in (b"Z", b"X") or bool(int(fields[_FLAGS]) & _PF_EXITING)
