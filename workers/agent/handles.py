"""A parent's hold on one rank process: first while it is starting, then with its queues joined."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from membership.base.errors import ElasticError
from membership.base.rank_id import ProcessId
from membership.base.timing import FORK_TIMEOUT_S, POOL_DEATH_S
from workers.agent.forkserver_client import Child
from workers.protocol.launch import Ready
from workers.protocol.liveness import DeathWatcher, LivenessPage, process_ended
from workers.protocol.messages import reader_id
from workers.queue.message_queue import MessageQueue

_closing = threading.Lock()


@dataclass
class _Handle:
    key: ProcessId
    death_writer: int  # the rank ends when the last copy of this is closed: there must be no other

    def close_death_pipe(self) -> None:
        """The gentlest way to have it end. Two threads may do so at once: a retirement, and the end of everything."""
        with _closing:
            pipe, self.death_writer = self.death_writer, -1
        if pipe >= 0:
            os.close(pipe)


@dataclass
class UnreadyWorkerProcHandle(_Handle):
    """A rank that was asked for; `ready_reader` gets its ready message, or ends with it. Ended by exactly one of
    `WorkerProcHandle.from_unready_handle` and `close`; another thread may `abandon` it meanwhile."""

    forked: Future[Child]
    ready_reader: int
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def left(self) -> bool:
        """Whether there is nothing here any more."""
        return self.ready_reader < 0

    def abandon(self) -> None:
        """End the process, as soon as there is one; not the ready pipe, on which another thread waits."""
        with self._lock:
            if not self.left:
                send_signal(self._child(), signal.SIGKILL)
                self.close_death_pipe()

    def close(self) -> None:
        """End the process and close all."""
        with self._lock:
            if self.left:
                return
            child = self._child()
            send_signal(child, signal.SIGKILL)
            if child is not None:
                os.close(child.pidfd)
            self.close_death_pipe()
            os.close(self.ready_reader)
            self.ready_reader = -1

    def hand_over(self) -> int:
        """Close the ready pipe, which has done its work; the death pipe is the caller's now."""
        with self._lock:
            os.close(self.ready_reader)
            pipe, self.ready_reader, self.death_writer = self.death_writer, -1, -1
            return pipe

    def _child(self) -> Child | None:
        if self.forked.cancel():
            return None
        with suppress(ElasticError, TimeoutError):
            return self.forked.result(timeout=FORK_TIMEOUT_S)
        return None


@dataclass
class WorkerProcHandle(_Handle):
    """A rank that is ready: its process, its answers, its liveness page."""

    child: Child
    worker_response_mq: MessageQueue | None  # None once it has ended
    peer_response_handles: list[bytes]  # for callers on other hosts: one each, in the order of their queues
    liveness: LivenessPage
    liveness_handle: bytes
    exchange_handle: bytes
    reader: str  # its name as a reader of its parent's calls: a spare keeps it when it becomes a rank
    watcher: DeathWatcher | None = None
    dead: str = ""  # how, once it is
    _closed: bool = field(default=False, repr=False)
    _writes_no_more: bool = field(default=False, repr=False)  # once that is certain; outlives the page
    _mapped: threading.Lock = field(default_factory=threading.Lock, repr=False)  # held while the page is looked at

    @classmethod
    def from_unready_handle(
        cls,
        unready: UnreadyWorkerProcHandle,
        child: Child,
        worker_response_mq: MessageQueue,
        liveness: LivenessPage,
        ready: Ready,
    ) -> WorkerProcHandle:
        """Take over the process and its death pipe."""
        return cls(
            unready.key,
            unready.hand_over(),
            child,
            worker_response_mq,
            ready.peer_response_handles,
            liveness,
            ready.liveness,
            ready.exchange,
            reader_id(unready.key),
        )

    def ended(self, timeout_s: float = 0.0) -> bool:
        """Whether the process has ended within `timeout_s`."""
        return process_ended(self.child.pidfd, timeout_s)

    def has_died(self) -> bool:
        """Whether it is dead by the kernel's first sign: the process may still be unmapping its memory."""
        return bool(self.dead or self.liveness.mutex.owner_died(0.0) or self.ended())

    def writes_no_more(self) -> bool:
        """Whether its main thread has certainly ended; from any thread, and after `close` too."""
        with self._mapped:
            if not self._closed and not self._writes_no_more:
                self._writes_no_more = bool(self.liveness.mutex.owner_died(POOL_DEATH_S) or self.ended())
            return self._writes_no_more

    def close(self) -> None:
        """Release all on our side."""
        with self._mapped:
            if self._closed:
                return
            self._closed = True
        self.close_death_pipe()
        if self.watcher is not None:
            self.watcher.stop()
        if self.worker_response_mq is not None:
            self.worker_response_mq.shutdown()
        self.liveness.close()
        os.close(self.child.pidfd)


def send_signal(child: Child | None, number: int) -> None:
    """Signal this process and no later one with its pid; nothing if it has ended."""
    if child is not None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, number)
