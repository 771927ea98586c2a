"""Members of a view that have no record in the store: whether anything still listens where their last one said.

An engine that has taken over waits for such records: after an outage of the store agents write them again. A host that
has died writes nothing, and the wait would keep all streams waiting. A standby has seen the records before they ran
out. So it asks there: what refuses a connection, or does not accept it in time, cannot be used for steps anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from membership.base.attempts import is_shortage
from membership.base.rank_id import RankId
from membership.base.sockets import accepts
from membership.base.timing import LINK_DIAL_S
from membership.store.records import ClusterState
from workers.protocol.exchange_handle import far_endpoint
from workers.queue.handle import this_host

AT_ONCE = 16
Ask = Callable[[str], bool]
"""Whether something accepts a connection at an endpoint."""


class Unrecorded:
    """`note` belongs to the mirror's thread, `gone` to the engine's. Only ranks of other hosts are asked for."""

    def __init__(self, ask: Ask = lambda endpoint: accepts(endpoint, LINK_DIAL_S), here: str = "") -> None:
        self.on_change: Callable[[], None] = lambda: None  # called in a thread of ours when there is an answer
        self._ask, self._here = ask, here or this_host()
        self._handles: dict[RankId, bytes] = {}
        self._asked: set[RankId] = set()
        self._gone: frozenset[RankId] = frozenset()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="unrecorded")

    def note(self, state: ClusterState) -> None:
        """Keep the last handle of each rank that is a member, or has a record."""
        members = {member.id for view in (state.view, state.next) if view is not None for member in view.members}
        known = {id: handle for id, handle in self._handles.items() if id in members}
        self._handles = known | {id: record.exchange_handle for id, record in state.ranks.items()}

    def gone(self, members: Set[RankId]) -> frozenset[RankId]:
        """Those of them that do not listen any more, as far as is known now. The others are being asked."""
        for member in members - self._asked:
            host, endpoint = far_endpoint(self._handles.get(member, b""))
            if endpoint and host != self._here:
                try:
                    answer = self._pool.submit(self._ask, endpoint)
                except RuntimeError as error:
                    if not is_shortage(error):
                        raise
                    break  # no thread is to be had: they are asked at the next look, or waited for
                self._asked.add(member)
                answer.add_done_callback(partial(self._answered, member))
        return self._gone & members

    def close(self) -> None:
        """Ask no more; what was asked is answered within LINK_DIAL_S."""
        self.on_change = lambda: None
        self._pool.shutdown(cancel_futures=True)

    def _answered(self, member: RankId, answer: Future[bool]) -> None:
        if answer.cancelled():
            return
        if not answer.result(timeout=0):
            with self._lock:
                self._gone |= {member}
            self.on_change()
