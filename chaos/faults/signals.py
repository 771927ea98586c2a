"""Faults of one process by a signal or a limit: dead, stopped, slow, out of descriptors.

Only processes whose ids the cluster itself reported are touched.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from contextlib import closing
from dataclasses import dataclass

from chaos.faults.base import OBEYED_S, POLL_S, PROCESSES, SEEN_S, Faults, NotInjected, Params, Site, poll, see
from chaos.faults.process import Hold, Limit, ProcessInjector

SLOW_RUN_S = 0.002  # how long a slowed process runs between two stops
SLOW_LOOK_S = 0.4

FAULTS = Faults()


@dataclass(frozen=True)
class Killed:
    """A SIGKILL that was delivered and seen to work. Times are `time.time()` seconds, except `at`."""

    pid: int
    sent_at: float
    gone_at: float
    at: float = 0.0  # when it was sent, on the monotonic clock that all processes of a host share


def kill(pid: int, timeout_s: float = OBEYED_S) -> Killed:
    """SIGKILL `pid` and wait until it is gone by the kernel's word; NotInjected if there is no such process."""
    with closing(Hold(pid, "the victim")) as hold:
        sent_at, at = time.time(), time.monotonic()
        hold.end(signal.SIGKILL, timeout_s)
        return Killed(pid, sent_at, time.time(), at)


@FAULTS.entry("kill", "SIGKILL: it is gone at once", victims=PROCESSES, heals=False)
class Kill(ProcessInjector):
    """SIGKILL."""

    def _affect(self, hold: Hold) -> str:
        return hold.end(signal.SIGKILL)


@FAULTS.entry("stop", "SIGSTOP until healed: it exists and does nothing", victims=PROCESSES, heals=True)
class Stop(ProcessInjector):
    """SIGSTOP, healed by SIGCONT."""

    def _affect(self, hold: Hold) -> str:
        return hold.stop()

    def _restore(self, hold: Hold) -> None:
        hold.resume()


@FAULTS.entry("segv", "SIGSEGV: it ends as by a wild pointer", victims=PROCESSES, heals=False)
class Segv(ProcessInjector):
    """SIGSEGV: the process has no chance to clean up."""

    def _affect(self, hold: Hold) -> str:
        proof = hold.end(signal.SIGSEGV)
        reason = hold.ended_by() or ended_by_history(self.site, hold.pid)
        return f"{proof}; {reason}" if reason else proof


@FAULTS.entry(
    "slow",
    "`factor` times slower: stopped and resumed in turns of a few milliseconds",
    victims=PROCESSES,
    heals=True,
    params={"factor": 10.0},
)
class Slow(ProcessInjector):
    """`factor` times slower: a thread of ours stops and resumes it in turns of a few milliseconds."""

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        super().__init__(site, victim, params)
        self._stop_s = SLOW_RUN_S * (float(params["factor"]) - 1.0)
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def _affect(self, hold: Hold) -> str:
        self._thread = threading.Thread(target=self._take_turns, args=(hold,), name=f"slow-{hold.pid}", daemon=True)
        self._thread.start()
        until = time.monotonic() + SEEN_S
        while (stopped := self._seen_stopped(hold)) < 0.75:  # we may be late ourselves where others take the processors
            if time.monotonic() > until:
                raise NotInjected(f"{self.victim} was seen stopped in {stopped:.0%} of many looks only")
        return f"/proc says stopped in {stopped:.0%} of many looks"

    def _seen_stopped(self, hold: Hold) -> float:
        """The share of looks in which it is stopped, over several turns."""
        looks = []
        until = time.monotonic() + max(SLOW_LOOK_S, 5 * self._stop_s)
        while time.monotonic() < until:
            looks.append(hold.state())
            self._ending.wait(timeout=self._stop_s / 6.5)
        return looks.count("T") / len(looks)

    def _take_turns(self, hold: Hold) -> None:
        while not self._ending.is_set() and hold.send(signal.SIGSTOP):
            self._ending.wait(timeout=self._stop_s)
            hold.send(signal.SIGCONT)
            time.sleep(SLOW_RUN_S)

    def _restore(self, hold: Hold) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout=SEEN_S)
        hold.resume()


@FAULTS.entry(
    "fd-exhaustion",
    "it can open nothing more: its limit is what it has open",
    victims=PROCESSES,
    heals=True,
    needs=("Linux",),
)
class FdExhaustion(ProcessInjector):
    """Its limit of open files is lowered to what it has open."""

    _limit: Limit | None = None

    def _affect(self, hold: Hold) -> str:
        self._limit = Limit(hold.pid, resource.RLIMIT_NOFILE)
        self._limit.lower(free := _first_free_fd(hold.pid))
        see(lambda: _first_free_fd(hold.pid) >= free, f"{self.victim} with no free descriptor below {free}")
        return f"a limit of {free} open files reads back; descriptors 0 to {free - 1} are all open"

    def _restore(self, hold: Hold) -> None:
        if self._limit is not None:
            self._limit.restore()


def ended_by_history(site: Site, pid: int, within_s: float = 2.0) -> str:
    """How a process ended, as its parent reports in the history; "" if it reports nothing."""

    def reported() -> str:
        for event in site.events():
            if event.kind in ("role_died", "rank_exited") and event.fields.get("pid") == pid:
                return f"{event.kind} in the history: {event.fields.get('reason') or event.fields}"
        return ""

    return poll(reported, within_s, POLL_S * 10)


def _first_free_fd(pid: int) -> int:
    """The number that the next open file of this process will get."""
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in range(len(taken) + 1) if number not in taken)
