"""WorkerProc, the parent's half: start a rank process, wait until it is ready, join its queues.

A rank comes from the forkserver with four descriptors: the ready pipe, on which it reports that it is ready and how
it is reached; the death pipe, whose end of file means that its parent is gone; the host's lock; and its KV pool. The
child's half is `workers/rank/worker_proc.py`; the executor's ladder ends a rank (`MultiprocExecutor.retire`).
"""

from __future__ import annotations

import os
import pickle
import select
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress

import msgspec

from membership.base.errors import NoResources, RankDied, RankError, WaitTimeout
from membership.base.rank_id import ProcessId
from workers.agent.forkserver_client import ForkServer
from workers.agent.handles import UnreadyWorkerProcHandle, WorkerProcHandle
from workers.ipc.doorbell import Doorbell
from workers.protocol.launch import MAX_READY_BYTES, RANK_MAIN, READY_STR, Launch, Ready
from workers.protocol.liveness import LivenessPage
from workers.queue.message_queue import MessageQueue

PARENT_READER = "parent"
JOIN_TIMEOUT_S = 10.0
REFUSAL_TIMEOUT_S = 1.0


class WorkerProcParent:
    """What a parent does to get a rank process; static methods only. Whole: `workers/worker_proc.py`."""

    @staticmethod
    def make_worker_process(
        launch: Launch, forkserver: ForkServer, host_lock: int, pool: int = -1
    ) -> UnreadyWorkerProcHandle:
        """Ask for a rank; returns at once, so that many start at the same time. `pool`: the memory of its KV cache."""
        with ExitStack() as theirs, ExitStack() as ours:
            ready_reader, ready_writer = os.pipe()
            theirs.callback(os.close, ready_writer)
            ours.callback(os.close, ready_reader)
            death_reader, death_writer = os.pipe()
            theirs.callback(os.close, death_reader)
            ours.callback(os.close, death_writer)
            fds = [ready_writer, death_reader, host_lock, *([pool] if pool >= 0 else [])]
            forked = forkserver.fork(RANK_MAIN, pickle.dumps(launch), fds)
            ours.pop_all()
        return UnreadyWorkerProcHandle(launch.key, death_writer, forked, ready_reader)

    @staticmethod
    def wait_each(
        unready: Sequence[UnreadyWorkerProcHandle], timeout_s: float
    ) -> Iterator[tuple[UnreadyWorkerProcHandle, Ready | RankError | WaitTimeout]]:
        """Each rank with its ready message or its error, in order of arrival: all pipes at once."""
        deadline = time.monotonic() + timeout_s
        waiting = {handle.ready_reader: handle for handle in unready}
        poller = select.poll()
        for fd in waiting:
            poller.register(fd, select.POLLIN)
        while waiting:
            left = deadline - time.monotonic()
            ready = poller.poll(max(0.0, left) * 1000)
            for fd, _ in ready:
                poller.unregister(fd)
                handle = waiting.pop(fd)
                yield handle, _ready_from(handle)
            if not ready and left <= 0:
                for handle in waiting.values():
                    yield handle, WaitTimeout(f"{handle.key} was not ready within {timeout_s:g} s")
                return

    @staticmethod
    def wait_for_ready(
        unready: Sequence[UnreadyWorkerProcHandle], timeout_s: float, doorbell: Doorbell
    ) -> list[WorkerProcHandle]:
        """All of them, ready. The first failure ends the wait, closes all of them, and its error names its rank."""
        ready: dict[ProcessId, WorkerProcHandle] = {}
        for handle, outcome in WorkerProcParent.wait_each(unready, timeout_s):
            if not isinstance(outcome, Ready):
                for made in ready.values():
                    made.close()
                for left in unready:
                    left.close()
                raise outcome
            ready[handle.key] = WorkerProcParent.wait_for_response_handle_ready(outcome, handle, doorbell)
        return [ready[handle.key] for handle in unready]

    @staticmethod
    def wait_for_response_handle_ready(
        ready: Ready, unready: UnreadyWorkerProcHandle, doorbell: Doorbell, timeout_s: float = JOIN_TIMEOUT_S
    ) -> WorkerProcHandle:
        """Join the rank's queue of replies and map its liveness page."""
        with ExitStack() as undo:
            child = unready.forked.result(timeout=timeout_s)
            replies = MessageQueue.create_from_handle(ready.handle, PARENT_READER, doorbell, timeout_s=timeout_s)
            undo.callback(replies.shutdown)
            liveness = LivenessPage.attach(ready.liveness)
            undo.pop_all()
        return WorkerProcHandle.from_unready_handle(unready, child, replies, liveness, ready)


def _ready_from(handle: UnreadyWorkerProcHandle) -> Ready | RankError:
    data = os.read(handle.ready_reader, MAX_READY_BYTES)
    if not data:
        error: BaseException | None = None
        with suppress(TimeoutError, CancelledError):
            error = handle.forked.exception(timeout=REFUSAL_TIMEOUT_S)
        if isinstance(error, NoResources):
            return error
        return RankDied(f"{handle.key}: {error or 'ended before it was ready'}")
    ready = msgspec.msgpack.decode(data, type=Ready)
    if ready.status != READY_STR:
        return RankError(f"{handle.key} could not start: {ready.error}")
    return ready
