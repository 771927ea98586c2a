"""Failpoints: named places where a process of the product dies, raises, hangs or waits, if its environment asks for it.

    ELASTIC_FAILPOINTS="controller.after.committed=1*kill;rank.before.prepare@2=hang"
    ELASTIC_FAILPOINTS=@/path/to/file   # the same in a file, which `write` may change while all processes run

`NAME[@RANK]=[N*]ACTION`; the actions are `kill` (SIGKILL itself), `segv`, `raise`, `hang` (asleep in native code),
`hang-gil` (with the interpreter's lock), `delay:MS` and `wait:FILE` (until FILE exists). What lasts ends when the fault
is taken out of the file. `N*`: only the first N times since it was armed, over all processes and restarts. For tests
only. Names begin with the role that passes them, so all roles and ranks may be given the same. Each blow is an event
`failpoint` in the history, before it is dealt: that is what `N*` counts, and how a test knows that its fault happened.
Without the variable, a failpoint is one comparison with None; armed by a file, it is one look at the file's age.
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
from membership.base.errors import ConfigError, ElasticError, WaitTimeout
from membership.base.events import Event, EventLog, Tail

ENV = "ELASTIC_FAILPOINTS"
HISTORY_ENV = "ELASTIC_FAILPOINTS_HISTORY"  # set by a role for the processes that it starts
# What the controller's transactions do; an operation is never left in the phases that are not among them.
EDGES = (
    "spawning", "handshaking", "loading", "committed", "retiring", "done", "aborted", "staged", "unstaged", "assigned",
)  # fmt: skip
RPCS = ("initialise", "become", "attach_engine", "prepare_epoch", "retire_epoch")  # an agent's calls to a rank
POINTS = (
    *(f"controller.{when}.{edge}" for edge in EDGES for when in ("before", "after")),
    "controller.before.campaign",
    "agent.before.spawn",
    "agent.before.retire",
    "agent.before.grant",  # of the leases of its own record and of its ranks'
    "agent.before.publish",
    "agent.before.withdraw",
    *(f"agent.before.{rpc}" for rpc in RPCS),
    *(f"rank.{rpc}" for rpc in RPCS),
    "rank.registered",
    "rank.before.prepare",
    "rank.prepared",
    "rank.step",
    "rank.copy",
    "rank.shutdown",
    "engine.before.campaign",
    "engine.before.attach",
    "engine.before.step",
    "engine.before.copy",
    "engine.before.flip",
    "engine.after.flip",
    "engine.before.status",
    "engine.hello",
    "engine.submit",
    "engine.abort",
    "gateway.before.hello",
    "gateway.before.submit",
    "gateway.before.abort",
    "gateway.before.propose",
    "gateway.before.cancel",
    "mirror.before.list",  # of every role
    "mirror.before.watch",
)
ACTIONS = ("kill", "segv", "raise", "hang", "hang-gil", "delay:MS", "wait:FILE")
WAIT_LIMIT_S = 120.0
KIND = "failpoint"

log = structlog.get_logger(__name__)


class FaultInjected(ElasticError):
    """What the action `raise` raises."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What happens at one failpoint."""

    name: str
    action: str  # kill | segv | raise | hang | hang-gil | delay | wait
    rank: int | None = None  # None: any
    limit: int | None = None  # None: each time
    file: str = ""  # for which `wait` waits
    ms: int = 0  # for how long `delay` does


def parse(text: str) -> tuple[Fault, ...]:
    """The faults that a value of the variable, or a file, asks for; ConfigError lists what there is."""
    return tuple(_fault(part.strip()) for part in text.split(";") if part.strip())


def _fault(text: str) -> Fault:
    actions = r"(kill|segv|raise|hang-gil|hang|delay:(\d+)|wait:(.+))"
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
    """Arm these faults, and no others, in all processes that read theirs from `path`; ConfigError if it names none.

    The file's time of change is the arming's name: N* counts from there.
    """
    parse(spec)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    draft.write_text(spec)
    now = time.time_ns()
    os.utime(draft, ns=(now, now))  # the kernel's own clock is too coarse to tell two armings apart
    draft.replace(path)


def read(path: Path) -> str:
    """What is armed there."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


# --- one process


@dataclass(frozen=True)
class _Arming:
    """Faults as they were armed at one time."""

    at: int = 0  # the file's time of change; 0: by the environment
    faults: tuple[Fault, ...] = ()
    spent: set[Fault] = field(default_factory=set)  # those that have happened as often as they were to


class Failpoints:
    """The faults of one process."""

    def __init__(self, source: Path | None, faults: tuple[Fault, ...], role: str, history: str) -> None:
        self.source = source
        self._arming = _Arming(faults=faults)
        self._history = history
        self._events, self._tail = EventLog(history, role), Tail(history)
        self._dealt: list[Event] = []  # by all processes

    def hit(self, name: str, rank: int | None) -> None:
        """Deal the blows that are due here."""
        arming = self._armed()
        for fault in arming.faults:
            if fault.name == name and fault.rank in (None, rank) and self._due(fault, arming, rank):
                log.warning("failpoint", name=name, action=fault.action)
                self._strike(fault)

    def _armed(self) -> _Arming:
        """What is armed now."""
        if self.source is None:
            return self._arming
        try:
            if os.stat(self.source).st_mtime_ns != self._arming.at:
                self._arming = _load(self.source)
        except FileNotFoundError:
            self._arming = _Arming()
        return self._arming

    def _due(self, fault: Fault, arming: _Arming, rank: int | None) -> bool:
        """Whether it is to happen once more; then it is in the history."""
        if fault in arming.spent or (fault.action == "wait" and Path(fault.file).exists()):
            return False
        with _alone(self._history):
            if fault.limit is not None and self._times(fault, arming.at) >= fault.limit:
                arming.spent.add(fault)
                return False
            self._events.emit(
                KIND, rank=rank, name=fault.name, action=fault.action, pid=os.getpid(), armed=arming.at
            )  # fmt: skip
        return True

    def _times(self, fault: Fault, armed_at: int) -> int:
        """How often it has happened since it was armed."""
        while (more := self._tail.read()) is not None:
            self._dealt += [event for event in more if event.kind == KIND]
        what = {"name": fault.name, "action": fault.action, "armed": armed_at}
        return sum(e.fields.items() >= what.items() and fault.rank in (None, e.rank) for e in self._dealt)

    def _strike(self, fault: Fault) -> None:
        def armed() -> bool:
            return fault in self._armed().faults

        if fault.action == "raise":
            raise FaultInjected(f"failpoint {fault.name}")
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
    """What the file says, and since when. Nobody dies of a file that somebody spoiled by hand."""
    with source.open() as file:
        at = os.fstat(file.fileno()).st_mtime_ns
        try:
            return _Arming(at, parse(file.read()))
        except (ConfigError, UnicodeDecodeError) as error:
            log.error("no failpoint is armed", source=str(source), error=str(error))
            return _Arming(at)


@contextmanager
def _alone(history: str) -> Iterator[None]:
    """One thread of one process at a time counts and adds; the kernel lets go for one that dies."""
    fd = os.open(history, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


_armed: Failpoints | None = None


def arm(role: str, history: str = "", environ: Mapping[str, str] = os.environ) -> None:
    """Have this process pass its failpoints as its environment says; ConfigError if that names what there is not.

    A role says where the history is, and so do the processes that it starts; once, before there are threads.
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
    log.warning("failpoints are armed: this process may fail on purpose", faults=asked)


def source() -> Path | None:
    """The file from which this process reads its faults, if it was started so."""
    return _armed.source if _armed is not None else None


def hit(name: str, rank: int | None = None) -> None:
    """Pass the failpoint `name`: nothing, unless this process was armed."""
    if _armed is not None:
        _armed.hit(name, rank)
