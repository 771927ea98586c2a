"""A parent's hold on one rank process: first while it is starting, then with its queues joined."""

from __future__ import annotations

import os
import select
import signal
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from membership.base.errors import ElasticError
from membership.base.rank_id import ProcessId
from membership.base.timing import FORK_TIMEOUT_S
from workers.agent.forkserver_client import Child
from workers.protocol.liveness import DeathWatcher, LivenessPage
from workers.protocol.messages import reader_id
from workers.queue.message_queue import MessageQueue


@dataclass
class UnreadyWorkerProcHandle:
    """A rank that was asked for; `ready_reader` tells when it is ready, or ended. It is left by exactly one of
    `WorkerProcHandle.from_unready_handle` and `close`."""

    key: ProcessId
    forked: Future[Child]
    ready_reader: int
    death_writer: int  # the rank ends when the last copy of this is closed: there must be no other

    @property
    def name(self) -> str:
        """For people."""
        return str(self.key)

    @property
    def left(self) -> bool:
        """Whether there is nothing here any more."""
        return self.ready_reader < 0

    def abandon(self) -> None:
        """End it, or have it end as soon as it is, without touching the ready pipe, on which somebody else waits."""
        if not self.left:
            send_signal(self._child(), signal.SIGKILL)
            self._close_death_pipe()

    def close(self) -> None:
        """End it and let go of everything."""
        if self.left:
            return
        child = self._child()
        send_signal(child, signal.SIGKILL)
        if child is not None:
            os.close(child.pidfd)
        self._close_death_pipe()
        os.close(self.ready_reader)
        self.ready_reader = -1

    def hand_over(self) -> int:
        """Close the ready pipe, which has done its work; the death pipe is the caller's now."""
        os.close(self.ready_reader)
        pipe, self.ready_reader, self.death_writer = self.death_writer, -1, -1
        return pipe

    def _child(self) -> Child | None:
        if self.forked.cancel():
            return None
        with suppress(ElasticError, TimeoutError):
            return self.forked.result(timeout=FORK_TIMEOUT_S)
        return None

    def _close_death_pipe(self) -> None:
        if self.death_writer >= 0:
            os.close(self.death_writer)
            self.death_writer = -1


@dataclass
class WorkerProcHandle:
    """A rank that is ready: its process, its answers, its liveness page."""

    key: ProcessId
    child: Child
    death_writer: int
    worker_response_mq: MessageQueue | None  # None once it has ended
    peer_response_handles: list[bytes]  # for callers on other hosts: one each, in the order of their queues
    liveness: LivenessPage
    liveness_handle: bytes
    exchange_handle: bytes
    reader: str  # its name as a reader of its parent's calls: a spare keeps it when it becomes a rank
    watcher: DeathWatcher | None = None
    dead: str = ""  # how, once it is
    _closed: bool = field(default=False, repr=False)

    @classmethod
    def from_unready_handle(
        cls,
        unready: UnreadyWorkerProcHandle,
        child: Child,
        worker_response_mq: MessageQueue,
        peer_response_handles: list[bytes],
        liveness: LivenessPage,
        liveness_handle: bytes,
        exchange_handle: bytes,
    ) -> WorkerProcHandle:
        """Take over the process and its death pipe."""
        return cls(
            unready.key,
            child,
            unready.hand_over(),
            worker_response_mq,
            peer_response_handles,
            liveness,
            liveness_handle,
            exchange_handle,
            reader_id(unready.key),
        )

    @property
    def name(self) -> str:
        """For people."""
        return str(self.key)

    def ended(self, timeout_s: float = 0.0) -> bool:
        """Whether the process has ended, after waiting for that as long as told."""
        return ended(self.child, timeout_s)

    def has_died(self) -> bool:
        """Whether it is dead already, by what the kernel says first: the process may still be unmapping its memory."""
        return bool(self.dead or self.liveness.mutex.owner_died(0.0) or self.ended())

    def close_death_pipe(self) -> None:
        """The gentlest way to ask it to go."""
        if self.death_writer >= 0:
            os.close(self.death_writer)
            self.death_writer = -1

    def close(self) -> None:
        """Let go of everything on our side."""
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


def ended(child: Child, timeout_s: float) -> bool:
    """Whether this process has ended within `timeout_s`."""
    poller = select.poll()
    poller.register(child.pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def send_signal(child: Child | None, number: int) -> None:
    """Signal this process and no later one with its pid; nothing if it has ended."""
    if child is not None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, number)
