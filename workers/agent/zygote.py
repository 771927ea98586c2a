"""The process that has imported what ranks need, kept from one run of the agent to the next.

An agent's forkserver is a fork of it, there at once; else each death of the agent would cost the imports again (a few
seconds, in which its ranks are away). Nothing depends on it: when it is dead, ranks and their forkserver run on, and
the next agent waits until another one has its imports done. One that hangs is ended.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import structlog

from membership.base.errors import RankError
from membership.base.logs import open_log
from membership.base.process_stats import ended, of_group
from membership.base.timing import FORKSERVER_FORK_S, FORKSERVER_IMPORTS_S
from workers.agent.forkserver_client import Child, ForkServer, environment

KILLED_S = 5.0  # max wait for the end of a process that was killed
log = structlog.get_logger(__name__)


class Zygote:
    """Owns the process. Make it in a thread that outlives it.

    One that this process was started with (`FORKSERVER_FD`) is used before one is started.
    """

    def __init__(
        self,
        preload: Sequence[str],
        environ: Mapping[str, str],
        log_path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._preload = tuple(preload)
        self._environ, self._log_path = environ, log_path
        self._forked: Future[Child] = Future()  # what was asked for last
        self._due = math.inf  # when it has to be there
        self._server = self._start()

    def _start(self) -> ForkServer:
        self._serving = threading.Event()
        with open_log(self._log_path) as out:  # where the ranks' words go
            return ForkServer(
                self._preload, on_exit=lambda pid, status: None, on_serving=lambda _: self._serving.set(),
                environ=self._environ, output=out, name="zygote",
            )  # fmt: skip

    def forkserver(self) -> socket.socket:
        """The owner's end of a forkserver of its own. If none can be made it reads as closed, and says so by that."""
        if not self._server.alive:
            self._server.close()
            self._server = self._start()
        target, environ = "workers.agent.forkserver:serve_link", msgspec.json.encode(environment(self._environ))
        with ExitStack() as undo, open_log(self._log_path) as out:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            with theirs:
                forked = self._server.fork(target, environ, [theirs.fileno(), out.fileno()], outlives=True)
            undo.pop_all()
        forked.add_done_callback(_let_go)
        within_s = FORKSERVER_FORK_S if self._serving.is_set() else FORKSERVER_IMPORTS_S
        self._forked, self._due = forked, self._clock() + within_s
        return ours

    def tend(self) -> None:
        """End a zygote that does not fork: the agent that waits for it reads so, and makes a forkserver of its own."""
        if self._clock() > self._due and not self._forked.done():
            log.warning(
                "zygote_killed", reason="it does not fork", pid=self._server.process and self._server.process.pid
            )
            self._server.kill()
            self._due = math.inf

    def close(self) -> None:
        """End it, and what is left of the forkservers that it made and their ranks: their agents are gone by now.

        They have ended when this returns. A large process takes a moment to end, and is no child of ours.
        """
        process, left = self._server.process, []
        if process is not None and process.poll() is None:  # its process group is its own
            os.killpg(process.pid, signal.SIGKILL)
            left = of_group(process.pid)
        self._server.close()
        if unended := [pid for pid in left if not ended(pid, KILLED_S)]:
            log.warning("ranks_not_ended", pids=unended)


def _let_go(forked: Future[Child]) -> None:
    with suppress(RankError):
        os.close(forked.result(timeout=0).pidfd)
