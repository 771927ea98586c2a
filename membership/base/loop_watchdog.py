"""Ends a role whose main loop hangs while its other threads go on renewing leases.

The timer is `faulthandler`'s, which does not need the interpreter's lock: a loop that hangs in native code is ended
too, and its traceback is in the role's log. Only a role's own process calls `require`; elsewhere `heartbeat` does
nothing.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from membership.base.timing import LOOP_LIMIT_S

HEARTBEAT_S = 1.0  # the timer is restarted at most this often

_limit_s = 0.0  # 0: not required
_next = 0.0


def require(limit_s: float = LOOP_LIMIT_S) -> None:
    """From now on, a watched loop that makes no progress for `limit_s` ends the process."""
    global _limit_s
    _limit_s = limit_s


@contextmanager
def watched() -> Iterator[None]:
    """Within the block, `heartbeat` must be called regularly. One loop per process."""
    global _next
    _next = 0.0
    heartbeat()
    try:
        yield
    finally:
        if _limit_s:
            faulthandler.cancel_dump_traceback_later()


def heartbeat() -> None:
    """Report that the loop makes progress."""
    global _next
    if _limit_s and (now := time.monotonic()) >= _next:
        _next = now + min(HEARTBEAT_S, _limit_s / 2)
        faulthandler.dump_traceback_later(_limit_s, exit=True, file=sys.__stderr__ or sys.stderr)
