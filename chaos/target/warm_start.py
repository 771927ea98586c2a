"""Processes that have the imports of `elastic serve` and of its ranks, for many clusters: each is a fork of them.

An interpreter of its own costs a cluster four seconds of a core, and its ranks five. What is tested is the same program
from its command line on; how a user's starts from nothing is tested where no `WarmStart` is given.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Self

import msgspec

from elastic.serve.role_fork import MODULES, Command, become
from membership.base.logs import open_log
from workers.agent.forkserver_client import FORKSERVER_FD, Child, ForkServer
from workers.agent.preload import WORKER_CLASS, preload_for
from workers.agent.zygote import Zygote

STDERR = 2
RUN = "chaos.target.warm_start:run"
PRELOAD = (
    *MODULES, "elastic.cli.client", "elastic.cli.doctor", "elastic.cli.rollout", "elastic.explain",
    "elastic.serve.role_fork", "elastic.serve.supervisor",
)  # fmt: skip
FORKED_S = 120.0  # imports included, on a busy machine
ENDED_S = 10.0  # max wait for the end of a command that was killed


class WarmProcess:
    """A process that another one forked for us, as far as a `Popen` is needed of it."""

    def __init__(self, child: Child, status: Future[int]) -> None:
        self.pid = child.pid
        self._pidfd, self._status = child.pidfd, status

    @property
    def returncode(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.poll()

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._status.result(timeout=0) if self._status.done() else None

    def wait(self, timeout: float) -> int:
        """Its exit status; subprocess.TimeoutExpired."""
        try:
            return self._status.result(timeout=timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(str(self.pid), timeout) from None

    def send_signal(self, number: int) -> None:
        """Whatever it does with it; none if it has ended."""
        if not self._status.done():
            with suppress(ProcessLookupError):  # its status is on its way
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Let go of it, once it has ended."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class WarmCommands:
    """Owns the process that has the imports of every role. A context manager; make it in a thread that outlives it."""

    def __init__(self, folder: Path) -> None:
        self._ends: dict[int, Future[int]] = {}
        self._lock = threading.Lock()
        with open_log(folder / "serve.log") as out:
            self._server = ForkServer(PRELOAD, on_exit=self._on_exit, output=out, name="warm-start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and what runs of it."""
        self._server.close()

    def start(
        self, arguments: Sequence[str], environ: Mapping[str, str], output: int, target: str = RUN
    ) -> WarmProcess:
        """`elastic ARGUMENTS`, in a session of its own. `target`: what calls `run`, below, in the fork."""
        return self._start(arguments, environ, [output], (), target)

    def run(
        self, arguments: Sequence[str], environ: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """`elastic ARGUMENTS`, to its end, with what it said. subprocess.TimeoutExpired: it was killed."""
        with TemporaryFile() as out, TemporaryFile() as err:
            process = self._start(arguments, environ, [out.fileno(), err.fileno()], [STDERR])
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(ENDED_S)
                raise
            finally:
                process.close()
            return subprocess.CompletedProcess(["elastic", *arguments], status, _text(out), _text(err))

    def _start(
        self,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        files: Sequence[int],
        numbers: Sequence[int],
        target: str = RUN,
    ) -> WarmProcess:
        """`files`: of its output, then those that are to have these `numbers`."""
        command = msgspec.msgpack.encode(Command.of("elastic.cli", arguments, environ, numbers))
        child = self._server.fork(target, command, files).result(FORKED_S)
        return WarmProcess(child, self._end_of(child.pid))

    def _on_exit(self, pid: int, status: int) -> None:
        self._end_of(pid).set_result(status)

    def _end_of(self, pid: int) -> Future[int]:
        """The same one for the two that ask; a later process may have the pid again."""
        with self._lock:
            if pid in self._ends:
                return self._ends.pop(pid)
            return self._ends.setdefault(pid, Future())


class WarmStart(WarmCommands):
    """Also owns the process that has the imports of ranks."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.zygote = Zygote(preload_for(WORKER_CLASS, str(model.resolve())), os.environ, folder / "zygote.log")
        with ExitStack() as undo:
            undo.callback(self.zygote.close)
            super().__init__(folder)
            undo.pop_all()

    def close(self) -> None:
        """End both."""
        try:
            super().close()
        finally:
            self.zygote.close()

    def start(
        self, arguments: Sequence[str], environ: Mapping[str, str], output: int, target: str = RUN
    ) -> WarmProcess:
        """The same. An agent of it need not start a forkserver."""
        with self.zygote.forkserver() as forkserver:
            number = forkserver.fileno()
            variables = {**environ, FORKSERVER_FD: str(number)}
            return self._start(arguments, variables, [output, number], [number], target)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def run(payload: bytes, files: list[int]) -> None:
    """In the fork."""
    os.setsid()
    become(msgspec.msgpack.decode(payload, type=Command), files)
