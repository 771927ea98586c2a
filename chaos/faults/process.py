"""What injectors of process faults share: a hold on one process that no other can be mistaken for, and looks at it.

All looks go to the kernel (/proc, a pidfd), never to the process itself or to what the cluster believes of it.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import psutil

from chaos.faults.base import Injected, NotInjected, Site
from chaos.faults.fault import Params

SEEN_S = 5.0  # a fault that is not seen within this time has not happened
POLL_S = 0.002
_STATE, _EXIT_CODE = 0, 49  # fields of /proc/PID/stat behind the process's name


class Hold:
    """One process, by pidfd: it is signalled as long as it lives, and its pid's next owner never."""

    def __init__(self, pid: int, victim: str) -> None:
        self.pid, self.victim = pid, victim
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise NotInjected(f"{victim}, process {pid}, is gone already") from None

    def close(self) -> None:
        """Let go."""
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

    def gone(self, within_s: float = 0.0) -> bool:
        """Whether the kernel says that it ended, now or within this time."""
        if self._pidfd < 0:
            return True
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(within_s * 1000))

    def state(self) -> str:
        """R running, S sleeping, T stopped, …; "" if it is gone."""
        return "" if self.gone() else (_stat(self.pid, _STATE) or "")

    def ended_by(self) -> str:
        """How the kernel says it ended; "" if its parent has taken that away before we could look."""
        code = _stat(self.pid, _EXIT_CODE)
        if not self.gone() or code is None:
            return ""
        number = int(code) & 0x7F
        return f"killed by {signal.Signals(number).name}" if number else f"exit code {int(code) >> 8}"


def _stat(pid: int, field: int) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()[field]


def see(sign: Callable[[], bool], what: str, within_s: float = SEEN_S) -> None:
    """Wait for the sign that the fault has happened; NotInjected says what was not seen."""
    deadline = time.monotonic() + within_s
    while not sign():
        if time.monotonic() > deadline:
            raise NotInjected(f"not seen within {within_s:g} s: {what}")
        time.sleep(POLL_S)


class OnProcess(ABC):
    """Base of the faults of one process: whoever is the victim when it is dealt. `heal` may be called any number of
    times; what there is to take back stands in `_heal`, which is called once, for a process that lives."""

    name = ""

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        self.site, self.victim, self.params = site, victim, params
        self._hold: Hold | None = None

    def inject(self) -> Injected:
        """Deal it; NotInjected, and healed, if it is not seen."""
        hold = self._hold = Hold(self.site.pid(self.victim), self.victim)
        at = time.time()
        try:
            proof = self._deal(hold)
        except BaseException:
            self.heal()
            raise
        if hold.gone():
            hold.close()  # who is dead needs no hold; whoever forgets to heal him then keeps no descriptor
        return Injected(
            fault=self.name, victim=self.victim, at=at, seen_at=time.time(), proof=proof, pid=hold.pid,
        )  # fmt: skip

    def heal(self) -> None:
        """Take it back."""
        hold, self._hold = self._hold, None
        if hold is not None:
            try:
                self._heal(hold)
            finally:
                hold.close()

    @abstractmethod
    def _deal(self, hold: Hold) -> str:
        """Do it and see it; the proof, in words."""

    def _heal(self, hold: Hold) -> None:  # noqa: B027 - of most faults nothing can be taken back
        """Take it back; the process may be gone by now. Nothing, unless there is something to take back."""


class Limit:
    """A resource limit of a process, and of what it starts from now on, that can be taken back."""

    def __init__(self, pid: int, kind: int) -> None:
        self.pid, self._kind = pid, kind
        self._before = resource.prlimit(pid, kind)
        self._set = -1

    def lower(self, to: int) -> None:
        """From now on no more than this; NotInjected if it does not read back so."""
        self._set = to
        resource.prlimit(self.pid, self._kind, (to, self._before[1]))
        if (found := resource.prlimit(self.pid, self._kind)[0]) != to:
            raise NotInjected(f"the limit of process {self.pid} was set to {to} and reads back as {found}")

    def restore(self) -> None:
        """As it was, in the process and in what it has started meanwhile."""
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
