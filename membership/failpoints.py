"""Failpoints: named places where a process of the product dies, raises, hangs or waits, if its environment asks for it.

    ELASTIC_FAILPOINTS="controller.after.committed=1*kill;rank.before.prepare@2=hang"

`NAME[@RANK]=[N*]ACTION`; the actions are `kill` (SIGKILL itself), `raise`, `hang` (until killed) and `wait:FILE` (until
FILE exists). `N*`: only the first N times, over all processes and restarts. For tests only. Names begin with the role
that passes them, so all roles and ranks may be given the same. Each blow is an event `failpoint` in the history, before
it is dealt: that is what `N*` counts, and how a test knows that its fault happened. Without the variable, a failpoint
is one comparison with None.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import structlog

from membership.errors import ConfigError, ElasticError, WaitTimeout
from membership.events import EventLog
from membership.types import Phase

ENV = "ELASTIC_FAILPOINTS"
HISTORY_ENV = "ELASTIC_FAILPOINTS_HISTORY"  # set by a role for the processes that it starts
EDGES = (*(phase.value for phase in Phase if phase is not Phase.PROPOSED), "staged", "unstaged", "assigned")
POINTS = (
    *(f"controller.{when}.{edge}" for edge in EDGES for when in ("before", "after")),  # of its transactions
    "agent.before.spawn",
    "rank.registered",
    "rank.before.prepare",
    "rank.prepared",
    "engine.before.flip",
    "engine.after.flip",
)
ACTIONS = ("kill", "raise", "hang", "wait:FILE")
WAIT_LIMIT_S = 120.0
POLL_S = 0.01
KIND = "failpoint"

log = structlog.get_logger(__name__)


class FaultInjected(ElasticError):
    """What the action `raise` raises."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What happens at one failpoint."""

    name: str
    action: str  # kill | raise | hang | wait
    rank: int | None = None  # None: any
    limit: int | None = None  # None: each time
    file: str = ""  # for which `wait` waits


def parse(text: str) -> tuple[Fault, ...]:
    """The faults that a value of the variable asks for; ConfigError lists what there is."""
    return tuple(_fault(part.strip()) for part in text.split(";") if part.strip())


def _fault(text: str) -> Fault:
    found = re.fullmatch(r"([^=@]+)(?:@(\d+))?=(?:(\d+)\*)?(kill|raise|hang|wait:(.+))", text)
    if found is None:
        raise ConfigError(
            f"{ENV}: {text!r} is no failpoint with an action",
            hint=f"write NAME[@RANK]=[N*]ACTION; actions: {', '.join(ACTIONS)}",
        )
    name, rank, limit, action, file = found.groups()
    if name not in POINTS:
        raise ConfigError(f"{ENV}: there is no failpoint {name!r}", hint=f"there are {', '.join(POINTS)}")
    return Fault(
        name=name,
        action=action.partition(":")[0],
        rank=int(rank) if rank else None,
        limit=int(limit) if limit else None,
        file=file or "",
    )


class Failpoints:
    """The faults of one process."""

    def __init__(self, faults: tuple[Fault, ...], role: str, history: str) -> None:
        self._faults, self._history = faults, history
        self._events = EventLog(history, role)

    def hit(self, name: str, rank: int | None) -> None:
        """Deal the blows that are due here."""
        for fault in self._faults:
            if fault.name == name and fault.rank in (None, rank) and self._due(fault):
                log.warning("failpoint", name=name, action=fault.action)
                _strike(fault)

    def _due(self, fault: Fault) -> bool:
        """Whether it is to happen once more; then it is in the history."""
        if fault.action == "wait" and Path(fault.file).exists():
            return False
        with _alone(self._history):
            if fault.limit is not None:
                past = (e for e in EventLog.read(self._history) if e.kind == KIND and e.fields["name"] == fault.name)
                if sum(e.fields["action"] == fault.action for e in past) >= fault.limit:
                    return False
            self._events.emit(KIND, rank=fault.rank, name=fault.name, action=fault.action, pid=os.getpid())
        return True


@contextmanager
def _alone(history: str) -> Iterator[None]:
    """One process at a time counts and adds; the kernel lets go for one that dies."""
    fd = os.open(history, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _strike(fault: Fault) -> None:
    pause, deadline = threading.Event(), time.monotonic() + WAIT_LIMIT_S
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action == "raise":
        raise FaultInjected(f"failpoint {fault.name}")
    while fault.action == "hang" or not Path(fault.file).exists():
        if fault.action == "wait" and time.monotonic() > deadline:
            raise WaitTimeout(f"failpoint {fault.name} has waited for {fault.file} for {WAIT_LIMIT_S:g} s")
        pause.wait(POLL_S)


_armed: Failpoints | None = None


def arm(role: str, history: str = "", environ: Mapping[str, str] = os.environ) -> None:
    """Have this process pass its failpoints as its environment says; ConfigError if that names what there is not.

    A role says where the history is, and so do the processes that it starts; once, before there are threads.
    """
    global _armed
    faults, history = parse(environ.get(ENV, "")), history or environ.get(HISTORY_ENV, "")
    if faults and not history:
        raise ConfigError(f"{ENV} is set, but not where the history is", hint=f"set {HISTORY_ENV} to a file")
    _armed = Failpoints(faults, role, history) if faults else None
    if faults:
        os.environ[HISTORY_ENV] = history
        log.warning("failpoints are armed: this process may fail on purpose", faults=environ[ENV])


def hit(name: str, rank: int | None = None) -> None:
    """Pass the failpoint `name`: nothing, unless this process was armed."""
    if _armed is not None:
        _armed.hit(name, rank)
