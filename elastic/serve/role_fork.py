"""Processes forked from their supervisor, which has imported what roles need: a second of a core for each otherwise.

They are forked while the supervisor has none but threads that sleep in the kernel, hence no connection to the store:
grpc's threads survive no fork. Importing it makes none. Each waits on a socket for its command; it ends if the
supervisor does. A role that is started again gets an interpreter of its own: by then there are threads.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import NoReturn

import msgspec
import setproctitle

MODULES = (
    "elastic.cli.main", "elastic.engine.role", "elastic.gateway.app", "membership.planning.controller",
    "membership.store.etcd", "workers.agent.agent", "tokenizers", "encodings.idna",
)  # fmt: skip
MAX_MESSAGE = 128 * 1024  # a longer command line or environment gets an interpreter of its own
MAX_FDS = 8
KILLED_S = 5.0  # max wait for the end of a process that was killed


class Command(msgspec.Struct, frozen=True):
    """`python -m MODULE ARGUMENTS`, as bytes: a name of a file need not be text. `fds`: numbers of its descriptors."""

    module: str
    arguments: tuple[bytes, ...]
    environ: dict[bytes, bytes]
    fds: tuple[int, ...]

    @classmethod
    def of(cls, module: str, arguments: Sequence[str], environ: Mapping[str, str], fds: Sequence[int]) -> Command:
        """The same from text, as `subprocess` takes it."""
        variables = {os.fsencode(name): os.fsencode(value) for name, value in environ.items()}
        return cls(module, tuple(map(os.fsencode, arguments)), variables, tuple(fds))


class ForkedProcess:
    """A child of this process, as far as a `Popen` is needed of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(pid)

    def wait(self, timeout: float) -> int:
        """Its end: the exit status, negative for a signal. subprocess.TimeoutExpired."""
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if not poller.poll(timeout * 1000):
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
            os.close(self._pidfd)
        return self.returncode

    def terminate(self) -> None:
        """SIGTERM, if it has not been waited for."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, if it has not been waited for."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)


class WaitingProcess:
    """A fork of this process that waits for its command. Its owner starts it, or closes it."""

    def __init__(self) -> None:
        """OSError: there is none."""
        for name in MODULES:
            importlib.import_module(name)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # what is buffered is ours to write
                stream.flush()
        self._process: ForkedProcess | None = None
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as undo, theirs:
            undo.callback(self._link.close)
            pid = os.fork()
            if pid == 0:
                _wait(theirs)
            undo.callback(os.waitpid, pid, 0)
            undo.callback(os.kill, pid, signal.SIGKILL)
            self._process = ForkedProcess(pid)
            undo.pop_all()

    @property
    def pid(self) -> int:
        """Of the fork; 0 once it was started or closed."""
        return self._process.pid if self._process is not None else 0

    def start(self, command: Command, output: int) -> ForkedProcess | None:
        """Have it run; None if it cannot, as when it is gone: then it is closed."""
        process = self._process
        message = msgspec.msgpack.encode(command)
        try:
            if process is None or len(message) > MAX_MESSAGE:
                return None
            socket.send_fds(self._link, [message], [output, *command.fds])
            self._process = None
            return process
        except OSError:
            return None
        finally:
            self.close()

    def close(self) -> None:
        """End it, unless it was started."""
        self._link.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait(KILLED_S)
            self._process = None


def _wait(link: socket.socket) -> NoReturn:
    """In the child: run what comes. Never returns, so that nothing of the supervisor's is undone here."""
    status = 1
    try:
        gc.freeze()  # the supervisor's objects, and whatever descriptors they think they have
        os.setsid()
        os.closerange(3, link.fileno())
        os.closerange(link.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        data, fds, _, _ = socket.recv_fds(link, MAX_MESSAGE, MAX_FDS)
        link.close()
        if data:
            become(msgspec.msgpack.decode(data, type=Command), fds)
            status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 - the last frame of a process
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)


def become(command: Command, fds: Sequence[int]) -> None:
    """Run it in this process, which is a fork. `fds`: the one for its output, then those that it names."""
    given = (os.open(os.devnull, os.O_RDONLY), *fds)
    above = max((2, *given, *command.fds)) + 1  # out of the way of the numbers that they are to have
    nothing, output, *others = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in given]
    for fd in given:
        os.close(fd)
    for number, fd in zip((0, 1, 2, *command.fds), (nothing, output, output, *others), strict=True):
        os.dup2(fd, number)
    os.closerange(above, above + len(given))
    words = [sys.executable.encode(), b"-m", command.module.encode(), *command.arguments]
    setproctitle.setproctitle(b" ".join(words).decode(errors="replace"))
    setproctitle.setthreadtitle("python3")
    os.environb.clear()  # after the title, which takes the place of what was in the environment
    os.environb.update(command.environ)
    sys.argv = [command.module, *map(os.fsdecode, command.arguments)]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)
