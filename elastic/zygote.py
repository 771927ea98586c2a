"""The process that has imported what ranks need, kept from one life of the agent to the next.

An agent's forkserver is a fork of it, there at once; else each death of the agent would cost the imports again (a few
seconds, in which its ranks are away). Nothing depends on it: when it is dead, ranks and their forkserver live on, and
the next agent waits until another one has its imports done.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from membership.errors import RankError
from membership.types import ClusterConfig
from workers.forkserver_link import Child, ForkServer
from workers.preload import preload_for

WORKER_CLASS = "workers.worker:EPWorker"  # what agents of `elastic serve` run


class Zygote:
    """Owns the process. Make it in a thread that lives as long as it shall."""

    def __init__(self, config: ClusterConfig, environ: Mapping[str, str], log_path: Path) -> None:
        self._preload = preload_for(WORKER_CLASS, config.model, config.dtype)
        self._environ, self._log_path = environ, log_path
        self._server = self._start()

    def _start(self) -> ForkServer:
        with self._log_path.open("ab") as out:  # where the ranks' words go
            return ForkServer(
                self._preload, on_exit=lambda pid, status: None, environ=self._environ, output=out, name="zygote"
            )

    def forkserver(self) -> socket.socket:
        """The owner's end of a forkserver of its own. If none can be made it reads as closed, and says so by that."""
        if not self._server.alive:
            self._server.close()
            self._server = self._start()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            forked = self._server.fork("workers.forkserver:serve_link", b"", [theirs.fileno()], outlives=True)
        forked.add_done_callback(_let_go)
        return ours

    def close(self) -> None:
        """End it; the forkservers that it made end with their owners."""
        self._server.close()


def _let_go(forked: Future[Child]) -> None:
    with suppress(RankError):
        os.close(forked.result(timeout=0).pidfd)
