"""Faults of one process: a hold on it that cannot hit another process by mistake, and the base of its injectors.

Whether a fault took effect is asked of the kernel (/proc, a pidfd), never of the process or of the cluster.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from abc import abstractmethod
from pathlib import Path

import psutil

from chaos.faults.base import OBEYED_S, NotInjected, SiteInjector, see
from membership.base.process_stats import is_stopped

_STATE, _EXIT_CODE = 0, 49  # fields of /proc/PID/stat after the process's name


class Hold:
    """One process, held by pidfd: signals never reach another process that got the same pid later."""

    def __init__(self, pid: int, victim: str) -> None:
        self.pid, self.name = pid, f"{victim}, process {pid},"
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise NotInjected(f"{self.name} is gone already") from None

    def close(self) -> None:
        """Release the pidfd; the process then counts as gone."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; False if the process is gone."""
        if self._pidfd < 0:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def end(self, number: signal.Signals, within_s: float = OBEYED_S) -> str:
        """End it by a signal and return the proof; NotInjected if it does not end."""
        self.send(number)
        if not self.gone(within_s):
            raise NotInjected(f"{self.name} did not end within {within_s:g} s of {number.name}")
        return f"pidfd says gone after {number.name}"

    def stop(self) -> str:
        """SIGSTOP it and return the proof; NotInjected if it ends instead."""
        self.send(signal.SIGSTOP)
        see(lambda: is_stopped(self.pid) or self.gone(), f"{self.name} stopped", OBEYED_S)
        if self.gone():
            raise NotInjected(f"{self.name} has ended")
        return "/proc says stopped (T)"

    def resume(self) -> None:
        """SIGCONT it and see it run (or gone)."""
        self.send(signal.SIGCONT)
        see(lambda: self.state() not in ("T", "t"), f"{self.name} running again")

    def gone(self, within_s: float = 0.0) -> bool:
        """Whether it has ended by the kernel's word, now or within this time."""
        if self._pidfd < 0:
            return True
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(within_s * 1000))

    def state(self) -> str:
        """R running, S sleeping, T stopped, …; "" if it is gone."""
        return "" if self.gone() else (_stat(self.pid, _STATE) or "")

    def ended_by(self) -> str:
        """How it ended by the kernel's word; "" if its parent has reaped it already."""
        code = _stat(self.pid, _EXIT_CODE)
        if not self.gone() or code is None:
            return ""
        number = int(code) & 0x7F
        return f"killed by {signal.Signals(number).name}" if number else f"exit code {int(code) >> 8}"


def _stat(pid: int, field: int) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()[field]


class ProcessInjector(SiteInjector):
    """Base of the faults of one process: the one that is the victim when the fault is injected.

    Subclasses implement `_affect` and `_restore`; `_restore` may find the process gone.
    """

    _hold: Hold | None = None

    def _prepare(self) -> None:
        self._hold = Hold(self.site.pid(self.victim), self.victim)
        self._pid = self._hold.pid

    def _inject(self) -> str:
        hold = self._hold
        if hold is None:
            raise NotInjected(f"{self.victim} was healed while the fault was injected")
        proof = self._affect(hold)
        if hold.gone():
            hold.close()  # so that no descriptor is left open if `heal` is never called
        return proof

    def _heal(self) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            try:
                self._restore(hold)
            finally:
                hold.close()

    @abstractmethod
    def _affect(self, hold: Hold) -> str:
        """Inject the fault and see it; returns the proof."""

    def _restore(self, hold: Hold) -> None:
        """Undo the fault."""


class Limit:
    """A resource limit of a process and of the children that it starts later, which can be restored."""

    def __init__(self, pid: int, kind: int) -> None:
        self.pid, self._kind = pid, kind
        self._before = resource.prlimit(pid, kind)
        self._set = -1

    def lower(self, to: int) -> None:
        """Set the soft limit; NotInjected if it does not read back."""
        self._set = to
        resource.prlimit(self.pid, self._kind, (to, self._before[1]))
        if (found := resource.prlimit(self.pid, self._kind)[0]) != to:
            raise NotInjected(f"the limit of process {self.pid} was set to {to} and reads back as {found}")

    def restore(self) -> None:
        """Restore the limit, also in children started meanwhile."""
        if self._set < 0:
            return
        try:
            family = [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        for pid in family:
            try:
                if resource.prlimit(pid, self._kind)[0] == self._set:
                    resource.prlimit(pid, self._kind, self._before)
            except ProcessLookupError:
                continue  # ended meanwhile
