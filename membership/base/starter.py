"""A process that ends with the one that started it, however that one ends: by a signal, a crash or a closed terminal.

A starter names itself in its environment, by pid and start time: a pid alone may be another process's by then. All of
its descendants see that name, whatever is between; one that watches reads the end from a pidfd, which needs neither
a handler in the starter nor a descriptor that a third process could hold open.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable

from membership.base.errors import ConfigError
from membership.base.process_stats import start_time
from membership.base.timing import ROLE_GRACE_S

ENV = "ELASTIC_STARTER"
CLOSE_TIMEOUT_S = 2.0


def named() -> str:
    """This process as a starter: what `ENV` says to those that are to end with it."""
    return f"{os.getpid()}:{start_time(os.getpid())}"


class StarterWatch:
    """Calls `on_end` in a thread of its own once the starter has ended, if there is one.

    From then on, what this process starts ends with this process: it names itself in its environment.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        starter, os.environ[ENV] = os.environ.get(ENV, ""), named()
        if starter in ("", os.environ[ENV]):
            return
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(
            target=self._watch, args=(_pidfd(starter), on_end), name="starter-watch", daemon=True
        )
        self._thread.start()

    def _watch(self, pidfd: int | None, on_end: Callable[[], None]) -> None:
        if pidfd is not None:
            poller = select.poll()
            for source in (pidfd, self._wake):
                poller.register(source, select.POLLIN)
            poller.poll()  # without a deadline: `close` ends it
            os.close(pidfd)
        if not self._closed.is_set():
            on_end()

    def close(self) -> None:
        """Stop watching. `on_end`, if it is running, is given a moment."""
        self._closed.set()
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join(timeout=CLOSE_TIMEOUT_S)
            os.close(self._wake)
            self._thread = None


def _pidfd(starter: str) -> int | None:
    """Of the process that is named; None if it is gone."""
    pid, _, born = starter.partition(":")
    try:
        pidfd = os.pidfd_open(int(pid))
    except ProcessLookupError:
        return None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{ENV}={starter} names no process: {error}", hint=f"unset {ENV}") from error
    if start_time(int(pid)) in (born, None):  # None: it has just ended, or /proc hides it; the pidfd is right
        return pidfd
    os.close(pidfd)
    return None


def end_with_starter() -> StarterWatch:
    """From now on this process ends with its starter: as by SIGTERM, and hard if that takes it too long."""

    def end() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        threading.Event().wait(ROLE_GRACE_S)
        os._exit(1)

    return StarterWatch(end)
