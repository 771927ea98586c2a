"""A role process of a one-machine cluster as its supervisor sees it: how it is started, and when again.

A role that dies is started again at once, then with a growing delay while it keeps dying early. Its leases are revoked
right away, so that no process waits for a TTL to run out.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import structlog

from elastic.serve.listening import LISTEN_FDS, Listeners
from elastic.serve.role_fork import KILLED_S, Command, ForkedProcess, WaitingProcess
from membership.base import starter
from membership.base.endings import OomKills, signal_name
from membership.base.errors import StoreError
from membership.base.logs import open_log
from membership.base.timing import ROLE_RESTART_MAX_S, STABLE_S
from membership.store.interface import Store
from workers.agent.forkserver_client import FORKSERVER_FD

log = structlog.get_logger(__name__)

ENTRY = "elastic.cli"  # the module that runs a role


def restart_delay_s(early_deaths: int) -> float:
    """Seconds to wait before the next start after `early_deaths` deaths in a row: 0, 0.2, 0.4, … 5."""
    return 0.0 if early_deaths <= 1 else min(0.1 * 2.0 ** (early_deaths - 1), ROLE_RESTART_MAX_S)


@dataclass
class RoleProcess:
    """One role: its command line, and its process while it has one."""

    name: str
    arguments: Sequence[str]
    log_path: Path
    process: subprocess.Popen[bytes] | ForkedProcess | None = None
    pidfd: int = -1
    early_deaths: int = 0
    started_at: float = 0.0
    start_at: float | None = None  # when to start it again; None while it runs
    stable_s: float = STABLE_S
    environment: dict[str, str] = field(default_factory=dict)
    forkserver: Callable[[], socket.socket] | None = None  # makes a new one for each start
    listeners: Listeners | None = None  # the same ones for each start
    waiting: WaitingProcess | None = None  # becomes its first process

    def start(self, now: float) -> None:
        """Start the process; it ends with this one. It has a session of its own (Ctrl-C is the supervisor's).

        OSError: it could not be started, and nothing of it is left.
        """
        environment = {**os.environ, **self.environment, starter.ENV: starter.named()}
        with open_log(self.log_path) as out, ExitStack() as given:
            fds: list[int] = []
            if self.forkserver is not None:
                fds.append(given.enter_context(self.forkserver()).fileno())
                environment[FORKSERVER_FD] = str(fds[-1])
            if self.listeners is not None:
                handed = [each.fileno() for each in self.listeners]
                fds += handed
                environment[LISTEN_FDS] = ",".join(map(str, handed))
            process = self._become(environment, fds, out.fileno()) or Child(
                [sys.executable, "-m", ENTRY, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=fds,
                env=environment,
                start_new_session=True,
            )
        try:
            self.pidfd = os.pidfd_open(process.pid)
        except BaseException:
            process.kill()
            process.wait(timeout=KILLED_S)
            raise
        self.process = process
        self.started_at, self.start_at = now, None

    def _become(self, environment: dict[str, str], fds: list[int], output: int) -> ForkedProcess | None:
        waiting, self.waiting = self.waiting, None
        command = Command.of(ENTRY, self.arguments, environment, fds)
        return waiting.start(command, output) if waiting is not None else None

    def on_exit(self, now: float, oom_kills: OomKills) -> str:
        """Reap it, schedule the next start, and return how it ended."""
        process = self.process
        if process is None:
            return "was not running"
        code = process.wait(timeout=KILLED_S)
        self._forget()
        self.early_deaths = 1 if now - self.started_at > self.stable_s else self.early_deaths + 1
        self.start_at = now + restart_delay_s(self.early_deaths)
        return f"killed by {signal_name(-code)}{oom_kills.of_a_death(code)}" if code < 0 else f"exit code {code}"

    def terminate(self) -> None:
        """SIGTERM, if it runs. A second one hastens its stop."""
        if self.process is not None:
            self.process.terminate()

    def ended(self, timeout_s: float) -> bool:
        """Whether it has ended within this time; then it is forgotten."""
        if self.process is not None:
            try:
                self.process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                return False
            self._forget()
        return True

    def kill(self) -> None:
        """SIGKILL, if it runs. `ended` says when that has worked."""
        if self.process is not None:
            self.process.kill()

    def last_words(self, lines: int = 3) -> str:
        """The end of its log, for an error message."""
        try:
            return " | ".join(_tail(self.log_path.open("rb"), lines))
        except OSError:
            return ""

    def _forget(self) -> None:
        os.close(self.pidfd)
        self.process, self.pidfd = None, -1


class Child(subprocess.Popen[bytes]):
    """A Popen that leaves no process behind if it raises after its fork, as it may for want of memory."""

    def __init__(self, *args: Any, **named: Any) -> None:
        try:
            super().__init__(*args, **named)
        except BaseException:
            if getattr(self, "pid", None):
                self.kill()
                self.wait(timeout=KILLED_S)
            raise


def _tail(file: IO[bytes], lines: int) -> list[str]:
    with file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
        return file.read().decode(errors="replace").splitlines()[-lines:]


class Owner(msgspec.Struct):
    """The process that a record is about."""

    pid: int = 0
    node: str = ""


class _Owned(msgspec.Struct):
    data: Owner


def leases_of(store: Store, prefix: str, pid: int | None = None, node: str = "") -> set[int]:
    """Leases under `prefix` whose record names process `pid` (None: any process) and no node other than `node`."""
    _, items = store.range(prefix)
    return {item.lease for item in items if item.lease and (pid is None or _names(item.value, pid, node))}


def nodes_of(store: Store, prefix: str) -> set[str]:
    """Nodes of which a process has a record under a lease: it lives, or died a moment ago."""
    _, items = store.range(prefix)
    owners = [owner_of(item.value) for item in items if item.lease]
    return {owner.node for owner in owners if owner is not None and owner.node}


def owner_of(record: bytes) -> Owner | None:
    """Whose record it is; None: it cannot be read."""
    try:
        return msgspec.json.decode(record, type=_Owned).data
    except msgspec.MsgspecError as error:
        log.warning("record_owner_unknown", error=str(error))
        return None


def _names(record: bytes, pid: int, node: str) -> bool:
    owner = owner_of(record)
    return owner is not None and owner.pid == pid and owner.node in ("", node)


def revoke_leases(store: Store, prefix: str, pid: int | None = None, node: str = "") -> None:
    """Revoke the leases of a dead process. If the store is unavailable, they expire after their TTL.

    Then once more: what it sent as it died may have put its office under another lease in between.
    """
    try:
        for _ in range(2):
            for lease in leases_of(store, prefix, pid, node):
                store.revoke(lease)
    except StoreError as error:
        log.warning("lease_revoke_failed", pid=pid, error=str(error))
