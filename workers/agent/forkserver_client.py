"""The owner's side of the forkserver: starts it, asks it for processes, learns of their ends, stops it.

A process that was started with one (the descriptor in ELASTIC_FORKSERVER_FD) uses that before it starts any.

Light: none of what the server imports is imported here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import msgspec
import structlog

from membership.base.attempts import pause_s
from membership.base.errors import NoResources, RankError, WaitTimeout
from workers.agent.forkserver import MAX_FDS, MAX_MESSAGE, Exited, Fork, Forked, NotForked, Serve, Serving, ToOwner

STOP_TIMEOUT_S = 5.0
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
FORKSERVER_FD = "ELASTIC_FORKSERVER_FD"
log = structlog.get_logger(__name__)

PROGRAM = "from workers.agent.forkserver import main; main()"


@dataclass(frozen=True)
class Child:
    """A process that the server forked. The caller closes `pidfd`, which means this process and never a later one."""

    pid: int
    pidfd: int


class ForkServer:
    """Owns one server process and the thread that listens to it. Make it in a thread that outlives it."""

    def __init__(
        self,
        preload: Sequence[str],
        *,
        on_exit: Callable[[int, int], None],
        on_serving: Callable[[Serving], None] | None = None,
        environ: Mapping[str, str] | None = None,
        output: IO[bytes] | None = None,
        name: str = "forkserver",
    ) -> None:
        self._on_exit = on_exit
        self._on_serving = on_serving
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Child]] = {}
        self._requests = 0
        self._refusal = ""
        self._closed = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None  # None if it came with this process
        if inherited := os.environ.pop(FORKSERVER_FD, ""):
            self._link = socket.socket(fileno=int(inherited))
            self._link.set_inheritable(False)
        else:
            self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, str(theirs.fileno()), str(os.getpid()), name],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment(environ),
                    start_new_session=True,  # a terminal's signals are our business
                )
        self._thread = threading.Thread(target=self._listen, name="forkserver-link", daemon=True)
        self._thread.start()
        with suppress(BrokenPipeError, ConnectionError):  # then the listener says so
            self._link.send(msgspec.msgpack.encode(Serve(tuple(preload))))

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return not self._refusal

    def fork(self, target: str, payload: bytes, fds: Sequence[int], *, outlives: bool = False) -> Future[Child]:
        """Ask for a process running `target` ("module:function") with `payload` and copies of `fds`.

        It ends with the server unless it `outlives` it.
        The future fails with RankError if the server cannot; cancel it or wait for it, or its pidfd stays open.
        """
        answer: Future[Child] = Future()
        with self._lock:
            self._requests += 1
            message = msgspec.msgpack.encode(Fork(self._requests, target, payload, outlives))
            if self._refusal:
                answer.set_exception(RankError(self._refusal))
            elif len(message) > MAX_MESSAGE or len(fds) > MAX_FDS:
                answer.set_exception(RankError(f"fork request of {len(message)} bytes, {len(fds)} descriptors refused"))
            else:
                self._pending[self._requests] = answer
                try:
                    socket.send_fds(self._link, [message], list(fds))
                except (BrokenPipeError, ConnectionError):
                    return answer  # the listener fails it
                except OSError as error:
                    del self._pending[self._requests]
                    answer.set_exception(NoResources(f"cannot ask for a process: {error.strerror}"))
        return answer

    def kill(self) -> None:
        """End it at once, or let go of it if it was not started here; what was asked of it fails."""
        if self.process is not None:
            self.process.kill()
        else:
            with suppress(OSError):
                self._link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop the server; its children, if any are left, see their death pipes close and then SIGKILL."""
        self._closed.set()
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)  # it answers with its own end, which ends the listener
        if self.process is not None:
            try:
                self.process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=STOP_TIMEOUT_S)
        self._thread.join(timeout=STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise WaitTimeout("the forkserver's listener thread did not end")
        self._link.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self) -> None:
        failures = 0
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._link, MAX_MESSAGE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                continue  # it closed with a request of ours unread; what it said before that is still to come
            except (OSError, MemoryError) as error:  # no memory for the message: it waits in the socket
                failures += 1
                log.warning("forkserver_not_read", error=str(error))
                self._closed.wait(pause_s(failures))
                continue
            failures = 0
            if not data:
                return self._refuse("the forkserver is gone")
            message = msgspec.msgpack.decode(data, type=ToOwner)
            if isinstance(message, Forked):
                self._forked(message, fds[0] if fds else -1)
            elif isinstance(message, NotForked):
                self._fail(message.request, message.error)
            elif isinstance(message, Exited):
                self._on_exit(message.pid, message.status)
            else:
                if message.error:
                    self._refuse(f"the forkserver cannot serve: {message.error}")
                if self._on_serving is not None:
                    self._on_serving(message)

    def _forked(self, message: Forked, pidfd: int) -> None:
        with self._lock:
            answer = self._pending.pop(message.request)
        if not answer.set_running_or_notify_cancel():
            if pidfd >= 0:
                os.close(pidfd)
        elif pidfd >= 0:
            answer.set_result(Child(message.pid, pidfd))
        else:  # the process ends when its caller closes the death pipe
            answer.set_exception(NoResources("no descriptor to be had for the new process"))

    def _fail(self, request: int, error: str) -> None:
        with self._lock:
            answer = self._pending.pop(request)
        if answer.set_running_or_notify_cancel():
            answer.set_exception(NoResources(error))

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self._refusal = self._refusal or reason
            pending, self._pending = self._pending, {}
        for answer in pending.values():
            if answer.set_running_or_notify_cancel():
                answer.set_exception(RankError(self._refusal))


def environment(environ: Mapping[str, str] | None) -> dict[str, str]:
    """Of what a forkserver forks: one thread per maths library, since ranks outnumber cores; our import path."""
    found = dict(os.environ if environ is None else environ)
    for name in ONE_THREAD:
        found.setdefault(name, "1")
    found.setdefault("TOKENIZERS_PARALLELISM", "false")
    found["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in sys.path))
    return found
