"""Running one role as a process: signals, the life of its supervisor, the store and the event log.

A role stops at the end of its supervisor as on SIGTERM, and is killed after ROLE_GRACE_S; so does a supervisor at the
end of who started it to end with it (`membership/base/starter.py`). A second signal hastens the stop and leaves
nothing out: `Stop.hurry` is set, and the exit status names the signal.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, TypeVar

import structlog

from elastic.serve.state_dir import ClusterAddress
from elastic.serve.trace_export import exported
from membership.base import descriptors, failpoints, loop_watchdog
from membership.base.errors import StoreDenied, StoreUnavailable
from membership.base.events import EventLog
from membership.base.rotation import Limit
from membership.base.run_dir import ENV as RUN_DIR_ENV
from membership.base.run_dir import NEWBORN_S, default_run_dir, make_run_dir, remove_run_dir, run_dir
from membership.base.starter import StarterWatch
from membership.base.timing import ATTEMPT_PAUSE_S, HURRY_GRACE_S, ROLE_GRACE_S, STORE_AWAITED_S
from membership.store.endpoints import require_listener
from membership.store.interface import Store

STORE_SEEN = "ELASTIC_STORE_SEEN"  # what the supervisor has seen of the store: a role must not start on another one

if TYPE_CHECKING:
    from membership.store.etcd import EtcdStore

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Stop(threading.Event):
    """Set once the process is asked to stop; `hurry` is set once it is asked again."""

    def __init__(self) -> None:
        super().__init__()
        self.hurry = threading.Event()
        self.status = 0  # of the exit: 128 + the signal that came second


class StopSignal:
    """A block's stop event, set by SIGTERM, SIGINT, a terminal that closes, or the end of the process that started us.

    After a second SIGTERM or SIGINT the block's end is the process's end, with a status that says so. A block that has
    not ended `hurry_s` later is ended hard, if that is not 0: its children end with it.
    """

    def __init__(self, hurry_s: float = 0.0) -> None:
        self._stop = Stop()
        self._hurry_s = hurry_s
        self._closed = threading.Event()
        self._starter: StarterWatch | None = None

    def __enter__(self) -> Stop:
        """Take over the signals, and watch the starter if there is one."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, self._on_signal)
        self._starter = StarterWatch(self._on_orphaned)
        return self._stop

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop watching; leave with the status that a second signal asked for."""
        self._closed.set()
        if self._starter is not None:
            self._starter.close()
        if self._stop.status and error is None:
            raise SystemExit(self._stop.status)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._stop.is_set() and number != signal.SIGHUP  # kernel and shell may both tell of a closed terminal
        if again and not self._stop.hurry.is_set():
            self._stop.status = 128 + number
            self._stop.hurry.set()
            if self._hurry_s:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel's, however the main thread hangs
                signal.setitimer(signal.ITIMER_REAL, self._hurry_s)
        self._stop.set()

    def _on_orphaned(self) -> None:
        log.warning("starter_died")
        self._stop.set()
        if not self._closed.wait(timeout=ROLE_GRACE_S):
            os._exit(1)


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


def reach_store(connect: Callable[[], T], stop: threading.Event, wait_s: float = STORE_AWAITED_S) -> T:
    """What `connect` returns, awaited for `wait_s`: to start a role again takes longer than an etcd that starts.

    A name that is not known is awaited, too: on Kubernetes it is not before its pod is ready. StoreUnavailable: no
    answer by then, or the role is to stop. StoreDenied and ConfigError (certificates) come at once.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return connect()
        except StoreUnavailable as error:
            if isinstance(error, StoreDenied) or not wait_s:
                raise
            if time.monotonic() > deadline:
                raise StoreUnavailable(f"{error} (waited for {wait_s:g} s)", hint=error.hint) from error
            log.warning("store_awaited", error=str(error), wait_s=wait_s)
            if stop.wait(ATTEMPT_PAUSE_S):
                raise


def connected(address: ClusterAddress, seen: str = "") -> EtcdStore:
    """One attempt at the store. Whether anything listens there is asked first: gRPC does not say why it does not."""
    require_listener(address.etcd)
    return address.connect(seen=seen)


@contextmanager
def run_dir_of(state_dir: Path) -> Iterator[None]:
    """The run directory of this role and of its ranks: its supervisor's, else the state directory's.

    The latter is removed at the end, unless another role that was started by itself has a socket in it.
    """
    supervised = bool(os.environ.get(RUN_DIR_ENV))
    if not supervised:
        os.environ[RUN_DIR_ENV] = str(run_dir(state_dir))
    directory = make_run_dir(default_run_dir())
    try:
        yield
    finally:
        if not supervised:
            from workers.ipc.handover import close_default  # its own socket, which most roles do not have

            close_default()
            remove_run_dir(directory, NEWBORN_S)


@contextmanager
def role(
    name: str, address: ClusterAddress, events: Path, limit: Limit, etcd_wait_s: float = STORE_AWAITED_S
) -> Iterator[tuple[Store, Stop, EventLog]]:
    """This process as a role: its connection to the store, its stop event and the history that it writes."""
    from membership.base.logs import configure
    from workers.ipc.cpu_priority import run_in_short_turns

    configure(name)
    descriptors.raise_limit()
    failpoints.arm(name, str(events))
    end_with_any_thread()
    loop_watchdog.require()
    run_in_short_turns()  # before there are threads: a role reacts at once, however busy the ranks are
    seen = os.environ.get(STORE_SEEN, "")
    with (
        run_dir_of(events.parent),
        StopSignal(HURRY_GRACE_S) as stop,
        exported(name),
        closing(reach_store(partial(connected, address, seen), stop, etcd_wait_s)) as store,
    ):
        yield store, stop, EventLog(events, name, limit=limit)
