"""Calls to ranks that an executor on another host made: `nnodes > 1`.

The caller owns the queue of its calls, and gives its handle to the other hosts' executors (`Elsewhere.callers`); their
ranks join it, and each answers on a queue of its own for this caller (`peer_response_handles`). All of it is msgpack.
The end of a rank's queue is its death here: its process belongs to its own host.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from typing import Any

import structlog

from membership.base.errors import QueueClosed, RankDied
from membership.base.rank_id import ProcessId, RankId
from workers.agent.worker_proc import JOIN_TIMEOUT_S, PARENT_READER
from workers.ipc.doorbell import Doorbell
from workers.protocol.rpc import CallTable, PendingCall, WireCall, WireReply
from workers.queue.message_queue import MessageQueue, MsgpackCodec

COLLECT_S = 0.1
SEND_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = 5.0

log = structlog.get_logger(__name__)


class CrossHostCaller:
    """Owns its queue of calls, the queues of replies it has joined, and the thread that reads them."""

    def __init__(self, name: str) -> None:
        self._calls = MessageQueue(name, codec=MsgpackCodec(WireCall))
        self._doorbell = Doorbell()
        self._table = CallTable()
        self._replies: dict[RankId, MessageQueue] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._collector = threading.Thread(target=self._collect, name="cross-host-replies", daemon=True)
        self._collector.start()

    def handle(self) -> bytes:
        """For `Elsewhere.callers` of the executors on the other hosts."""
        return self._calls.export_handle().encode()

    def adopt(self, key: RankId, peer_response_handle: bytes) -> None:
        """Join this rank's replies to us."""
        replies = MessageQueue.create_from_handle(
            peer_response_handle, PARENT_READER, self._doorbell, timeout_s=JOIN_TIMEOUT_S, codec=MsgpackCodec(WireReply)
        )
        with self._lock:
            self._replies[key] = replies

    def submit(
        self,
        method: str,
        args: Collection[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        keys: Collection[RankId] | None = None,
        output_rank: int | None = None,
        timeout_s: float = 60.0,
    ) -> PendingCall:
        """As MultiprocExecutor.submit; methods by name, plain values only."""
        with self._lock:
            known = frozenset(self._replies)
        targets = known if keys is None else frozenset(keys)
        number, pending = self._table.open(method, targets, output_rank, timeout_s, time.monotonic())
        call = WireCall(number, targets, method, list(args), kwargs or {}, output_rank, timeout_s)
        gone: dict[ProcessId, str] = dict.fromkeys(targets - known, "its queue has ended, or was never joined")
        return pending.begin(gone, lambda: self._calls.enqueue(call, timeout_s=min(timeout_s, SEND_TIMEOUT_S)))

    def collective_rpc(self, method: str, timeout_s: float = 60.0, args: Collection[Any] = ()) -> list[Any]:
        """Call all adopted ranks and wait: the results in rank order."""
        outcome = self.submit(method, args, timeout_s=timeout_s).future.result(timeout=timeout_s + STOP_TIMEOUT_S)
        return [outcome[key] for key in sorted(outcome)]

    def _collect(self) -> None:
        while not self._stopping.is_set():
            self._doorbell.wait(self._anything, COLLECT_S)
            for key, replies in self._joined():
                self._read(key, replies)
            self._table.expire(time.monotonic())

    def _joined(self) -> list[tuple[RankId, MessageQueue]]:
        with self._lock:
            return list(self._replies.items())

    def _anything(self) -> bool:
        return self._stopping.is_set() or any(replies.pending() for _, replies in self._joined())

    def _read(self, key: RankId, replies: MessageQueue) -> None:
        try:
            while (reply := replies.try_dequeue()) is not None:
                if reply.key == key and not self._table.on_reply(reply.local()):
                    log.info("late_reply_dropped", call=reply.id, rank=key.rank)
        except QueueClosed as closed:
            with self._lock:
                del self._replies[key]
            replies.shutdown()
            self._table.on_death(key, str(closed))

    def close(self) -> None:
        """Release all ranks; they run on."""
        self._table.close(RankDied("the caller was closed"))
        self._stopping.set()
        self._doorbell.ring()
        self._collector.join(timeout=STOP_TIMEOUT_S)
        for _, replies in self._joined():
            replies.shutdown()
        self._calls.shutdown()
        self._doorbell.close()
