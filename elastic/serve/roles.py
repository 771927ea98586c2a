"""All role processes of a one-machine cluster: started, watched, started again, stopped.

A role that cannot be started, for want of a descriptor, memory or a process, is tried again; the others go on.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import structlog

from elastic.serve.role_process import RoleProcess
from membership.base.attempts import Attempts
from membership.base.endings import OomKills
from membership.base.timing import HURRY_GRACE_S

POLL_S = 0.25
LOOK_S = 0.05  # between two looks at whether a stop is to be hastened

log = structlog.get_logger(__name__)


class Roles:
    """Owns the processes."""

    def __init__(
        self,
        attempts: Attempts,
        *,
        on_start: Callable[[RoleProcess], None],
        on_started: Callable[[RoleProcess], None],
        on_died: Callable[[RoleProcess, int, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_start`: called before each start; `on_died` gets the pid and how it ended."""
        self._attempts, self._clock = attempts, clock
        self._on_start, self._on_started, self._on_died = on_start, on_started, on_died
        self._oom_kills = OomKills()
        self._all: list[RoleProcess] = []

    def __iter__(self) -> Iterator[RoleProcess]:
        return iter(self._all)

    def add(self, role: RoleProcess) -> None:
        """Have it running from the next turn on."""
        role.start_at = self._clock()
        self._all.append(role)

    def turn(self, timeout_s: float = POLL_S) -> None:
        """Start what is due, wait for an end for `timeout_s` at most, and schedule what has ended."""
        self.start_due()
        poller = select.poll()
        for role in self._all:
            if role.pidfd >= 0:
                poller.register(role.pidfd, select.POLLIN)
        dead = {fd for fd, _ in poller.poll(timeout_s * 1000)}
        for role in self._all:
            if role.pidfd in dead:
                pid = role.process.pid if role.process else 0
                how = role.on_exit(self._clock(), self._oom_kills)
                self._attempts.once(partial(self._on_died, role, pid, how), f"end of {role.name}")
        self.start_due()

    def start_due(self) -> None:
        """Start each role whose time has come."""
        now = self._clock()
        for role in self._all:
            if role.start_at is not None and now >= role.start_at:
                self._attempts.run(partial(self._start, role, now), f"start of {role.name}")

    def _start(self, role: RoleProcess, now: float) -> None:
        self._on_start(role)
        role.start(now)
        self._on_started(role)

    def stop(self, together: Sequence[tuple[str, ...]], grace_s: Mapping[str, float], hurry: threading.Event) -> None:
        """SIGTERM to one group after the other, and SIGKILL to each role that takes longer than its grace.

        Once `hurry` is set all that are left get SIGTERM again and again, which hastens them, and HURRY_GRACE_S.
        """
        for names in together:
            left = [role for role in self._all if role.name in names]
            for role in left:
                role.terminate()
            begun = self._clock()
            while not hurry.is_set() and (left := [role for role in left if not role.ended(LOOK_S)]):
                self._kill([role for role in left if self._clock() - begun > grace_s[role.name]])
        left, begun = self._all, self._clock()
        while left := [role for role in left if not role.ended(LOOK_S)]:
            for role in left:
                role.terminate()
            self._kill(left if self._clock() - begun > HURRY_GRACE_S else ())

    def _kill(self, late: Iterable[RoleProcess]) -> None:
        for role in late:
            log.warning("role_stop_timeout", name=role.name)
            role.kill()
