"""Faults of one process that a signal or a limit deals: dead, stopped, slow, out of descriptors.

Only processes whose ids the cluster itself reported are touched.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import threading
import time
from dataclasses import dataclass

from chaos.faults.base import NotInjected, Site
from chaos.faults.fault import PROCESSES, Fault, Params
from chaos.faults.process import POLL_S, SEEN_S, Hold, Limit, OnProcess, see
from membership.base.errors import ElasticError, WaitTimeout

SLOW_RUN_S = 0.002  # a slow process runs for so long at a time
SLOW_LOOK_S = 0.4


@dataclass(frozen=True)
class Killed:
    """A SIGKILL that was delivered and seen to work. Times are `time.time()` seconds, but for `at`."""

    pid: int
    sent_at: float
    gone_at: float
    at: float = 0.0  # when it was sent, on the monotonic clock, which processes of one host share


def kill(pid: int, timeout_s: float = 5.0) -> Killed:
    """SIGKILL `pid` and wait until the kernel says it is gone; ElasticError if there was no such process."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise ElasticError(f"process {pid} is gone already: nothing was injected") from None
    try:
        sent_at, at = time.time(), time.monotonic()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            raise WaitTimeout(f"process {pid} did not die within {timeout_s} s of SIGKILL")
        return Killed(pid, sent_at, time.time(), at)
    finally:
        os.close(pidfd)


class Kill(OnProcess):
    """SIGKILL."""

    name = "kill"

    def _deal(self, hold: Hold) -> str:
        hold.send(signal.SIGKILL)
        return _ended(hold, "SIGKILL")


class Segv(OnProcess):
    """SIGSEGV: the process ends as by a wild pointer, without a chance to tidy up."""

    name = "segv"

    def _deal(self, hold: Hold) -> str:
        hold.send(signal.SIGSEGV)
        proof = _ended(hold, "SIGSEGV")
        told = hold.ended_by() or ended_by_history(self.site, hold.pid)
        return f"{proof}; {told}" if told else proof


class Stop(OnProcess):
    """SIGSTOP: it lives and does nothing until it is healed (SIGCONT)."""

    name = "stop"

    def _deal(self, hold: Hold) -> str:
        hold.send(signal.SIGSTOP)
        see(lambda: hold.state() == "T", f"{self.victim}, process {hold.pid}, stopped")
        return "/proc says stopped (T)"

    def _heal(self, hold: Hold) -> None:
        hold.send(signal.SIGCONT)
        see(lambda: hold.state() not in ("T", "t"), f"{self.victim}, process {hold.pid}, running again")


class Slow(OnProcess):
    """So many times slower: a thread of ours stops it and lets it run by turns of a few milliseconds."""

    name = "slow"

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        super().__init__(site, victim, params)
        self._stop_s = SLOW_RUN_S * (float(params["factor"]) - 1.0)
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def _deal(self, hold: Hold) -> str:
        self._thread = threading.Thread(target=self._take_turns, args=(hold,), name=f"slow-{hold.pid}", daemon=True)
        self._thread.start()
        looks = []
        until = time.monotonic() + max(SLOW_LOOK_S, 5 * self._stop_s)
        while time.monotonic() < until:
            looks.append(hold.state())
            self._ending.wait(timeout=self._stop_s / 6.5)
        stopped = looks.count("T") / len(looks)
        if stopped < 0.75:
            raise NotInjected(f"{self.victim} was seen stopped in {stopped:.0%} of {len(looks)} looks only")
        return f"/proc says stopped in {stopped:.0%} of {len(looks)} looks"

    def _take_turns(self, hold: Hold) -> None:
        while not self._ending.is_set() and hold.send(signal.SIGSTOP):
            self._ending.wait(timeout=self._stop_s)
            hold.send(signal.SIGCONT)
            time.sleep(SLOW_RUN_S)

    def _heal(self, hold: Hold) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout=SEEN_S)
        hold.send(signal.SIGCONT)
        see(lambda: hold.state() not in ("T", "t"), f"{self.victim}, process {hold.pid}, running again")


class FdExhaustion(OnProcess):
    """It can open nothing any more: its limit of open files is what it has open."""

    name = "fd-exhaustion"

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        super().__init__(site, victim, params)
        self._limit: Limit | None = None

    def _deal(self, hold: Hold) -> str:
        self._limit = Limit(hold.pid, resource.RLIMIT_NOFILE)
        self._limit.lower(free := _first_free_fd(hold.pid))
        see(lambda: _first_free_fd(hold.pid) >= free, f"{self.victim} with no free descriptor below {free}")
        return f"a limit of {free} open files reads back; descriptors 0 to {free - 1} are all open"

    def _heal(self, hold: Hold) -> None:
        if self._limit is not None:
            self._limit.restore()


def _ended(hold: Hold, by: str) -> str:
    if not hold.gone(SEEN_S):
        raise NotInjected(f"{hold.victim}, process {hold.pid}, did not end within {SEEN_S:g} s of {by}")
    return f"pidfd says gone after {by}"


def ended_by_history(site: Site, pid: int, within_s: float = 2.0) -> str:
    """How a process ended, as its parent tells in the history; "" if it does not."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        for event in site.events():
            if event.kind in ("role_died", "rank_exited") and event.fields.get("pid") == pid:
                return f"{event.kind} in the history: {event.fields.get('reason') or event.fields}"
        time.sleep(POLL_S * 10)
    return ""


def _first_free_fd(pid: int) -> int:
    """The number that the next open file of this process will get."""
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in range(len(taken) + 1) if number not in taken)


FAULTS = {
    "kill": Fault(about="SIGKILL: it is gone at once", victims=PROCESSES, heals=False, make=Kill),
    "stop": Fault(about="SIGSTOP until healed: it lives and does nothing", victims=PROCESSES, heals=True, make=Stop),
    "segv": Fault(about="SIGSEGV: it ends as by a wild pointer", victims=PROCESSES, heals=False, make=Segv),
    "slow": Fault(
        about="so many times slower: stopped by turns of a few milliseconds",
        victims=PROCESSES, heals=True, make=Slow, params={"factor": 10.0},
    ),
    "fd-exhaustion": Fault(
        about="it can open nothing more: its limit is what it has open", victims=PROCESSES, heals=True,
        make=FdExhaustion, needs=("Linux",),
    ),
}  # fmt: skip
