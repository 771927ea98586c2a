"""A rank's side of a caller on another host (`nnodes > 1`): plain values in msgpack, methods by name, no pickle.

Such a caller has its own pair of queues (`workers/agent/cross_host.py`). Loaded only where there is one.
"""

from __future__ import annotations

from typing import Any

from membership.base.errors import RankError
from membership.base.rank_id import RankId
from workers.protocol.rpc import Failure, WireCall, WireReply
from workers.queue.message_queue import Codec, MsgpackCodec
from workers.rank.call_port import CallPort


class CrossHostPort(CallPort):
    """A CallPort in the network's codec."""

    def codecs(self) -> tuple[Codec, Codec]:
        """See CallPort."""
        return MsgpackCodec(WireCall), MsgpackCodec(WireReply)

    def arguments(self, call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See CallPort."""
        return tuple(call.args), call.kwargs

    def message(self, number: int, output: Any) -> Any:
        """See CallPort."""
        if isinstance(output, Failure):
            return WireReply(number, self._rank_id(), failure=output)
        return WireReply(number, self._rank_id(), output)

    def _rank_id(self) -> RankId:
        if not isinstance(self.key, RankId):
            raise RankError(f"{self.key} was called from another host")
        return self.key
