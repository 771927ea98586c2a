"""Failpoints: named places where a process of the product dies, raises, hangs or waits, if its environment asks for it.

    ELASTIC_FAILPOINTS="controller.after.committed=1*kill;rank.before.prepare@2=hang"
    ELASTIC_FAILPOINTS=@/path/to/file   # the same in a file, which `write` may change while all processes run

`NAME[@RANK]=[N*]ACTION`; the actions are `kill` (SIGKILL itself), `segv`, `raise`, `lose-device` and `fill-device`
(raise what a device does that has failed for good, or lacks memory), `hang` (asleep in native code), `hang-gil` (with
the interpreter's lock), `delay:MS` and `wait:FILE` (until FILE exists). What lasts ends when the fault is taken out of
the file. `N*`: only the first N times since it was armed, counted over all processes and restarts. For
tests only. A name begins with the role that passes it (`failpoint_catalogue.py`), so all roles and ranks may share one
setting. Each fault is recorded as an event `failpoint` in the history before it is injected: `N*` counts these events,
and a test reads there that its fault happened. Without the variable, a failpoint costs one comparison with None; with a
file, one `stat`.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import structlog

from membership.base import failpoint_actions
from membership.base.errors import ConfigError, DeviceLost, ElasticError, OutOfDeviceMemory, WaitTimeout
from membership.base.events import Event, EventLog, Tail
from membership.base.failpoint_catalogue import POINTS

ENV = "ELASTIC_FAILPOINTS"
HISTORY_ENV = "ELASTIC_FAILPOINTS_HISTORY"  # set by a role for the processes that it starts
ACTIONS = ("kill", "segv", "raise", "lose-device", "fill-device", "hang", "hang-gil", "delay:MS", "wait:FILE")
WAIT_LIMIT_S = 120.0
KIND = "failpoint"

log = structlog.get_logger(__name__)


class FaultInjected(ElasticError):
    """What the action `raise` raises."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What happens at one failpoint."""

    name: str
    action: str  # kill | segv | raise | lose-device | fill-device | hang | hang-gil | delay | wait
    rank: int | None = None  # None: any
    limit: int | None = None  # None: every time
    file: str = ""  # that `wait` waits for
    ms: int = 0  # duration of `delay`


def parse(text: str) -> tuple[Fault, ...]:
    """Parse the variable's value, or a file's text; ConfigError lists the known names and actions."""
    return tuple(_fault(part.strip()) for part in text.split(";") if part.strip())


def _fault(text: str) -> Fault:
    actions = r"(kill|segv|raise|lose-device|fill-device|hang-gil|hang|delay:(\d+)|wait:(.+))"
    found = re.fullmatch(r"([^=@]+)(?:@(\d+))?=(?:(\d+)\*)?" + actions, text)
    if found is None:
        raise ConfigError(
            f"{ENV}: {text!r} is no failpoint with an action",
            hint=f"write NAME[@RANK]=[N*]ACTION; actions: {', '.join(ACTIONS)}",
        )
    name, rank, limit, action, ms, file = found.groups()
    if name not in POINTS:
        raise ConfigError(f"{ENV}: there is no failpoint {name!r}", hint=f"there are {', '.join(POINTS)}")
    return Fault(
        name=name,
        action=action.partition(":")[0],
        rank=int(rank) if rank else None,
        limit=int(limit) if limit else None,
        file=file or "",
        ms=int(ms or 0),
    )


# --- the file


def write(path: Path, spec: str) -> None:
    """Arm exactly these faults in all processes that read `path`; ConfigError if a name or action is unknown.

    The file's modification time identifies the arming: `N*` counts from there.
    """
    parse(spec)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    draft.write_text(spec, encoding="utf-8")
    now = time.time_ns()
    os.utime(draft, ns=(now, now))  # the kernel's own clock is too coarse to tell two armings apart
    draft.replace(path)


def read(path: Path) -> str:
    """Return what is armed there; "" if nothing is."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


# --- one process


@dataclass(frozen=True)
class _Arming:
    """Faults as they were armed at one time."""

    at: int = 0  # the file's time of change; 0: by the environment
    faults: tuple[Fault, ...] = ()
    spent: set[Fault] = field(default_factory=set)  # those that have reached their limit


class Failpoints:
    """The faults of one process."""

    def __init__(self, source: Path | None, faults: tuple[Fault, ...], role: str, history: str) -> None:
        self.source = source
        self._arming = _Arming(faults=faults)
        self._history = history
        self._events, self._tail = EventLog(history, role), Tail(history)
        self._injected: list[Event] = []  # events of all processes

    def hit(self, name: str, rank: int | None) -> None:
        """Inject the faults that are due here."""
        arming = self._armed()
        for fault in arming.faults:
            if fault.name == name and fault.rank in (None, rank) and self._due(fault, arming, rank):
                log.warning("failpoint", name=name, action=fault.action)
                self._inject(fault)

    def _armed(self) -> _Arming:
        """Return what is armed now."""
        if self.source is None:
            return self._arming
        try:
            if os.stat(self.source).st_mtime_ns != self._arming.at:
                self._arming = _load(self.source)
        except FileNotFoundError:
            self._arming = _Arming()
        return self._arming

    def _due(self, fault: Fault, arming: _Arming, rank: int | None) -> bool:
        """Whether the fault is to happen once more. If so, it is recorded in the history first."""
        if fault in arming.spent or (fault.action == "wait" and Path(fault.file).exists()):
            return False
        with _locked(self._history):
            if fault.limit is not None and self._times(fault, arming.at) >= fault.limit:
                arming.spent.add(fault)
                return False
            self._events.emit(KIND, rank=rank, name=fault.name, action=fault.action, pid=os.getpid(), armed=arming.at)
        return True

    def _times(self, fault: Fault, armed_at: int) -> int:
        """How often it happened since it was armed, in any process."""
        while (more := self._tail.read()) is not None:
            self._injected += [event for event in more if event.kind == KIND]
        what = {"name": fault.name, "action": fault.action, "armed": armed_at}
        return sum(e.fields.items() >= what.items() and fault.rank in (None, e.rank) for e in self._injected)

    def _inject(self, fault: Fault) -> None:
        def armed() -> bool:
            return fault in self._armed().faults

        if fault.action == "raise":
            raise FaultInjected(f"failpoint {fault.name}")
        if fault.action == "lose-device":
            raise DeviceLost(f"failpoint {fault.name}")
        if fault.action == "fill-device":
            raise OutOfDeviceMemory(f"failpoint {fault.name}")
        if fault.action == "kill":
            failpoint_actions.kill()
        elif fault.action == "segv":
            failpoint_actions.segv()
        elif fault.action == "delay":
            failpoint_actions.pause(armed, fault.ms / 1000)
        elif fault.action == "wait":
            if not failpoint_actions.pause(lambda: armed() and not Path(fault.file).exists(), WAIT_LIMIT_S):
                raise WaitTimeout(f"failpoint {fault.name} has waited for {fault.file} for {WAIT_LIMIT_S:g} s")
        else:
            failpoint_actions.hang(armed, self.source, with_lock=fault.action == "hang-gil")


def _load(source: Path) -> _Arming:
    """Read the file. A file that cannot be parsed arms nothing: a typing error must not end a process."""
    with source.open(encoding="utf-8") as file:
        at = os.fstat(file.fileno()).st_mtime_ns
        try:
            return _Arming(at, parse(file.read()))
        except (ConfigError, UnicodeDecodeError) as error:
            log.error("failpoints_unreadable", source=str(source), error=str(error))
            return _Arming(at)


@contextmanager
def _locked(history: str) -> Iterator[None]:
    """Hold the history's lock, so that counting and recording are one step. The kernel unlocks it if we die."""
    fd = os.open(history, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


_armed: Failpoints | None = None


def arm(role: str, history: str = "", environ: Mapping[str, str] = os.environ) -> None:
    """Arm this process as its environment says; ConfigError if that names an unknown failpoint.

    To be called once, before there are threads. Processes that this one starts inherit the path of the history.
    """
    global _armed
    asked, history = environ.get(ENV, ""), history or environ.get(HISTORY_ENV, "")
    source = Path(asked[1:]) if asked.startswith("@") else None
    faults = parse(asked) if source is None else ()
    _armed = None
    if source is None and not faults:
        return
    if not history:
        raise ConfigError(f"{ENV} is set, but not where the history is", hint=f"set {HISTORY_ENV} to a file")
    _armed = Failpoints(source, faults, role, history)
    os.environ[HISTORY_ENV] = history
    log.warning("failpoints_armed", faults=asked)


def source() -> Path | None:
    """The file from which this process reads its faults, if there is one."""
    return _armed.source if _armed is not None else None


def hit(name: str, rank: int | None = None) -> None:
    """Pass the failpoint `name`. Does nothing unless this process is armed."""
    if _armed is not None:
        _armed.hit(name, rank)
