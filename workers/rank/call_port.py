"""A rank's side of one caller: the queue of its calls and the queue of our replies to it.

The parent on this host speaks pickle and may send functions. A caller on another host (`nnodes > 1`) has its own pair
of queues, with the writer of the calls outside; it speaks msgpack, names methods, and sends plain values only.
"""

from __future__ import annotations

import threading
import traceback
from functools import partial
from typing import Any

import structlog

from membership.base.errors import QueueError
from workers.ipc.doorbell import Doorbell
from workers.protocol.messages import reader_id
from workers.protocol.rpc import Call, Failure, RankKey, Reply, ResponseStatus, WireCall, WireReply, failure_of
from workers.queue.message_queue import Handle, MessageQueue, MsgpackCodec, PickleCodec
from workers.rank.output import OutputThread
from workers.rank.worker_api import AsyncOutput

JOIN_TIMEOUT_S = 10.0
REPLY_TIMEOUT_S = 5.0

log = structlog.get_logger(__name__)


class CallPort:
    """Made by joining the caller's queue. Replies may come from two threads; the output thread is its own."""

    def __init__(self, key: RankKey, calls_handle: bytes, number: int, doorbell: Doorbell) -> None:
        self.key = key  # changes once, when a spare becomes a rank
        self._wire = Handle.decode(calls_handle).codec != PickleCodec.name
        self._replying = threading.Lock()
        self.outputs = OutputThread(f"outputs-{number}")
        self.calls = MessageQueue.create_from_handle(
            calls_handle,
            reader_id(*key),
            doorbell,
            timeout_s=JOIN_TIMEOUT_S,
            codec=MsgpackCodec(WireCall) if self._wire else PickleCodec(),
        )
        codec = MsgpackCodec(WireReply) if self._wire else PickleCodec()
        try:
            self.replies = MessageQueue(f"{reader_id(*key)}-replies-{number}", codec=codec)
        except BaseException:
            self.calls.shutdown()
            raise

    def take(self) -> Call | WireCall | None:
        """The next call for this rank. QueueClosed when the caller is gone."""
        while (call := self.calls.try_dequeue()) is not None:
            if self.key in call.ranks:
                return call  # type: ignore[no-any-return]
        return None

    def await_output(self, call: Call | WireCall, output: AsyncOutput) -> None:
        """Reply when the output is there, from the port's thread: one output after the other."""
        self.outputs.put(output, call.timeout_s, partial(self.reply, call))

    def reply(self, call: Call | WireCall, output: Any) -> None:
        """Reply, if a reply is wanted of this rank; a failure is always told."""
        if not isinstance(output, Failure) and call.output_rank not in (None, self.key[0]):
            return
        with self._replying:
            try:
                self._send(call.id, output)
            except QueueError as error:
                log.warning("reply_dropped", call=call.id, rank=self.key[0], reason=str(error))
            except Exception as error:  # noqa: BLE001 - a result that cannot travel
                self._send(call.id, failure_of(error, traceback.format_exc()))

    def _send(self, number: int, output: Any) -> None:
        failure = output if isinstance(output, Failure) else None
        message: Reply | WireReply
        if self._wire:
            message = WireReply(number, self.key, None if failure else output, failure)
        else:
            status = ResponseStatus.FAILURE if failure else ResponseStatus.SUCCESS
            message = Reply(number, self.key, status, output)
        self.replies.enqueue(message, timeout_s=REPLY_TIMEOUT_S)

    def close(self) -> None:
        """Leave."""
        self.outputs.close()
        self.replies.shutdown()
        self.calls.shutdown()
