"""Out of memory, in two ways. Where a memory cgroup was delegated to us, the kernel's OOM killer does it. Elsewhere the
process's address space is limited to half of what it has, so that its next allocations fail (MemoryError); if it
survives that, it is killed, as the kernel would (`starve`: it runs on with the limit until it is healed).

A cgroup is ours if its owner says so: by the variable ELASTIC_CHAOS_CGROUP, or by systemd's mark for delegated groups.
Other groups are left alone: their manager may rely on what is in them.
"""

from __future__ import annotations

import errno
import os
import resource
import secrets
import signal
from pathlib import Path

from chaos.faults.base import PROCESSES, Faults, NotInjected, Params, Site, see
from chaos.faults.process import Hold, Limit, ProcessInjector

ENV = "ELASTIC_CHAOS_CGROUP"
MARK = "user.delegate"  # set to 1 by systemd (Delegate=yes)
KILLED_S = 20.0  # a process that allocates nothing is never killed
LEAVE_S = 5.0
ENDED_S = 1.0

FAULTS = Faults()


class Group:
    """A memory cgroup of our own, below one that was delegated to us, with a limit of no memory."""

    def __init__(self, parent: Path) -> None:
        self.path = parent / f"elastic-ep-oom-{secrets.token_hex(4)}"
        self.path.mkdir()
        self._limit, self._counter = (
            (self.path / "memory.max", self.path / "memory.events")
            if (self.path / "memory.max").exists()
            else (self.path / "memory.limit_in_bytes", self.path / "memory.oom_control")
        )
        self._limit.write_text("0", encoding="utf-8")

    def take(self, pid: int) -> None:
        """Move the process here. Its pages stay charged to its old group; new ones are charged to this one."""
        (self.path / "cgroup.procs").write_text(str(pid), encoding="utf-8")

    def kills(self) -> int:
        """Number of processes that the OOM killer has killed here."""
        return next(
            int(line.split()[1])
            for line in self._counter.read_text(encoding="utf-8").splitlines()
            if line.startswith("oom_kill ")
        )

    def give_back(self, to: Path) -> None:
        """Move all remaining processes to the group `to` and remove this one."""
        for pid in (self.path / "cgroup.procs").read_text(encoding="utf-8").split():
            try:
                (to / "cgroup.procs").write_text(pid, encoding="utf-8")
            except ProcessLookupError:
                continue
        see(self._removed, f"cgroup {self.path.name} removed", LEAVE_S)

    def _removed(self) -> bool:
        try:
            self.path.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True


def delegated() -> Path | None:
    """The memory cgroup in which we may make groups, if there is one."""
    if given := os.environ.get(ENV):
        return Path(given)
    mine = _group_of(os.getpid())
    try:
        return mine if mine is not None and os.getxattr(mine, MARK) == b"1" else None
    except OSError:
        return None


def _group_of(pid: int) -> Path | None:
    """The memory cgroup of a process: version 1's, or the only one of version 2."""
    for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
        _, kinds, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup/memory" if "memory" in kinds.split(",") else "/sys/fs/cgroup")
        if ("memory" in kinds.split(",") or not kinds) and (found := root / path.lstrip("/")).is_dir():
            return found
    return None


@FAULTS.entry(
    "oom",
    "out of memory: the kernel's OOM killer, or no address space left (MemoryError)",
    victims=PROCESSES,
    heals=True,
    needs=("a delegated memory cgroup, for the OOM killer",),
    params={"how": "auto"},
)
class Oom(ProcessInjector):
    """See the top of this file. `how`: cgroup, limit, starve, or auto (cgroup if one is available, else limit)."""

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        super().__init__(site, victim, params)
        self._how = str(params["how"])
        self._limit: Limit | None = None
        self._group: Group | None = None
        self._home: Path | None = None

    def _affect(self, hold: Hold) -> str:
        parent = delegated() if self._how in ("auto", "cgroup") else None
        if parent is None and self._how == "cgroup":
            raise NotInjected("no memory cgroup was delegated to us", hint=f"name one in {ENV}")
        if parent is not None:
            try:
                return self._by_kernel(hold, parent)
            except NotInjected:  # it wanted no memory
                if self._how == "cgroup":
                    raise
                self._restore(hold)
        return self._by_limit(hold)

    def _by_kernel(self, hold: Hold, parent: Path) -> str:
        self._home = _group_of(hold.pid)
        self._group = group = Group(parent)
        group.take(hold.pid)
        see(lambda: group.kills() > 0 and hold.gone(), f"{self.victim} killed for want of memory", KILLED_S)
        return f"the cgroup counts {group.kills()} OOM kill; pidfd says gone"

    def _by_limit(self, hold: Hold) -> str:
        has = _address_space(hold.pid)
        self._limit = Limit(hold.pid, resource.RLIMIT_AS)
        self._limit.lower(has // 2)
        proof = f"a limit of {has // 2} bytes of address space reads back; it had {has}"
        if hold.gone(ENDED_S):
            return f"{proof}; pidfd says gone"
        if self._how == "starve":
            return proof
        hold.end(signal.SIGKILL, KILLED_S)
        return f"{proof}; it lived on for {ENDED_S:g} s, and was killed as the kernel would; pidfd says gone"

    def _restore(self, hold: Hold) -> None:
        if self._limit is not None:
            self._limit.restore()
        group, self._group = self._group, None
        if group is not None and self._home is not None:
            group.give_back(self._home)


def _address_space(pid: int) -> int:
    """Bytes of address space that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
