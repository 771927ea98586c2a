"""Running one role as a process: signals, the death pipe from the supervisor, the store and the event log.

A role started by `elastic serve` inherits a pipe (file descriptor in ELASTIC_DEATH_FD); end of file on it means that
the supervisor is gone: the role stops as on SIGTERM, and is killed after ROLE_GRACE_S. A second signal ends it
at once.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import structlog

from elastic.serve.state_dir import ClusterAddress
from membership.base import failpoints, loop_watchdog
from membership.base.events import EventLog
from membership.base.run_dir import ENV as RUN_DIR_ENV
from membership.base.run_dir import default_run_dir, make_run_dir, run_dir
from membership.base.timing import ROLE_GRACE_S
from membership.store.interface import Store

DEATH_FD = "ELASTIC_DEATH_FD"
STORE_SEEN = "ELASTIC_STORE_SEEN"  # what the supervisor has seen of the store: a role must not start on another one

log = structlog.get_logger(__name__)


class StopSignal:
    """A block's stop event, set by SIGTERM, SIGINT or the supervisor's death; a second signal exits at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._closed = threading.Event()
        self._wake = -1  # an eventfd that ends the watcher's wait
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> threading.Event:
        """Take over SIGTERM and SIGINT, and watch the death pipe if there is one."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        inherited = os.environ.pop(DEATH_FD, "")
        if inherited:
            os.set_inheritable(int(inherited), False)
            self._wake = os.eventfd(0)
            self._watcher = threading.Thread(target=self._watch, args=(int(inherited),), name="death-pipe", daemon=True)
            self._watcher.start()
        return self._event

    def __exit__(self, *exc: object) -> None:
        """Stop watching the death pipe."""
        self._closed.set()
        if self._watcher is not None:
            os.eventfd_write(self._wake, 1)
            self._watcher.join(timeout=2.0)
            os.close(self._wake)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            os._exit(128 + number)
        self._event.set()

    def _watch(self, fd: int) -> None:
        poller = select.poll()
        for source in (fd, self._wake):
            poller.register(source, select.POLLIN | select.POLLHUP)
        poller.poll()  # without a deadline: the block's end ends it
        if not self._closed.is_set():
            log.warning("supervisor_died")
            self._event.set()
            if not self._closed.wait(timeout=ROLE_GRACE_S):
                os._exit(1)
        os.close(fd)


def end_with_any_thread() -> None:
    """From now on, an unhandled exception in any thread ends the process.

    A missing thread would go unnoticed otherwise: leases lapse, deaths are not reported. The supervisor starts the role
    again.
    """

    def end(failed: threading.ExceptHookArgs) -> None:
        name = failed.thread.name if failed.thread is not None else "a thread"
        info = (failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback)
        log.critical("thread_failed", thread=name, exc_info=info)
        os._exit(1)

    threading.excepthook = end


@contextmanager
def role(name: str, address: ClusterAddress, events: Path) -> Iterator[tuple[Store, threading.Event, EventLog]]:
    """This process as a role: its connection to the store, its stop event and the history that it writes."""
    from membership.base.logs import configure
    from workers.ipc.cpu_priority import run_in_short_turns

    configure(name)
    failpoints.arm(name, str(events))
    end_with_any_thread()
    os.environ.setdefault(RUN_DIR_ENV, str(run_dir(events.parent)))  # its ranks', too
    make_run_dir(default_run_dir())
    loop_watchdog.require()
    run_in_short_turns()  # before there are threads: a role reacts at once, however busy the ranks are
    seen = os.environ.get(STORE_SEEN, "")
    with StopSignal() as stop, closing(address.connect(seen=seen)) as store:
        yield store, stop, EventLog(events, name)
