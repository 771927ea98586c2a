"""A rank's side of its parent: the queue of its calls and the queue of our replies to it.

The parent on this host speaks pickle and may send functions. A caller on another host has a `CrossHostPort`.
"""

from __future__ import annotations

import threading
import traceback
from functools import partial
from typing import Any

import cloudpickle
import structlog

from membership.base.errors import QueueError
from membership.base.rank_id import ProcessId
from membership.base.timing import REPLY_TIMEOUT_S
from workers.ipc.doorbell import Doorbell
from workers.protocol.messages import reader_id
from workers.protocol.rpc import AnyCall, Failure, Reply, ResponseStatus, failure_of
from workers.queue.message_queue import Codec, MessageQueue, PickleCodec
from workers.rank.output import OutputThread
from workers.rank.worker_api import AsyncOutput

JOIN_TIMEOUT_S = 10.0

log = structlog.get_logger(__name__)


class CallPort:
    """Made by joining the caller's queue. Replies may come from two threads; the output thread is its own."""

    def __init__(self, key: ProcessId, calls_handle: bytes, number: int, doorbell: Doorbell) -> None:
        self.key = key  # changes once, when a spare becomes a rank
        self._replying = threading.Lock()
        self.outputs = OutputThread(f"outputs-{number}")
        calls, replies = self.codecs()
        self.calls = MessageQueue.create_from_handle(
            calls_handle, reader_id(key), doorbell, timeout_s=JOIN_TIMEOUT_S, codec=calls
        )
        try:
            self.replies = MessageQueue(f"{reader_id(key)}-replies-{number}", codec=replies)
        except BaseException:
            self.calls.shutdown()
            raise

    def codecs(self) -> tuple[Codec, Codec]:
        """Of the calls and of the replies."""
        return PickleCodec(), PickleCodec()

    def arguments(self, call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call."""
        args, kwargs = cloudpickle.loads(call.arguments)
        return args, kwargs

    def message(self, number: int, output: Any) -> Any:
        """The reply to call `number`: `output` is its result, or a Failure."""
        status = ResponseStatus.FAILURE if isinstance(output, Failure) else ResponseStatus.SUCCESS
        return Reply(number, self.key, status, output)

    def take(self) -> AnyCall | None:
        """The next call for this rank. QueueClosed when the caller is gone."""
        while (call := self.calls.try_dequeue()) is not None:
            if self.key in call.ranks:
                return call  # type: ignore[no-any-return]
        return None

    def await_output(self, call: AnyCall, output: AsyncOutput) -> None:
        """Reply when the output is there, from the port's thread: one output after the other."""
        self.outputs.put(output, call.timeout_s, partial(self.reply, call))

    def reply(self, call: AnyCall, output: Any) -> None:
        """Reply, if a reply is wanted of this rank; a failure is always reported."""
        if not isinstance(output, Failure) and call.output_rank not in (None, self.key.slot):
            return
        with self._replying:
            try:
                self._send(call.id, output)
            except QueueError as error:
                log.warning("reply_dropped", call=call.id, rank=self.key.slot, reason=str(error))
            except Exception as error:  # noqa: BLE001 - a result that cannot travel
                self._send(call.id, failure_of(error, traceback.format_exc()))

    def _send(self, number: int, output: Any) -> None:
        self.replies.enqueue(self.message(number, output), timeout_s=REPLY_TIMEOUT_S)

    def close(self) -> None:
        """Leave both queues and end the thread."""
        self.outputs.close()
        self.replies.shutdown()
        self.calls.shutdown()
