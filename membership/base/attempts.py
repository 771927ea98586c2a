"""Steps of a loop that must outlive faults: one that fails for want of something is tried again, later each time.

Descriptors, memory, threads, processes and disk run out, and come back. A loop that ends by that takes with it what it
looks after, so it runs its steps through `Attempts`: `LOOPS` (tests/support/loops.py) has each of them, and a test that
makes its calls fail.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable

import structlog

from membership.base.timing import ATTEMPT_PAUSE_MAX_S, ATTEMPT_PAUSE_S

SHORTAGES = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC}
)  # also of ZeroMQ's errors

log = structlog.get_logger(__name__)


def is_shortage(error: BaseException) -> bool:
    """Whether the machine lacked something (a descriptor, memory, a thread, a file, a network), not the program."""
    no_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    return no_thread or isinstance(error, OSError | MemoryError) or getattr(error, "errno", None) in SHORTAGES


def started(thread: threading.Thread) -> bool:
    """Start it; False if the machine has no thread now."""
    try:
        thread.start()
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        return False
    return True


def pause_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: 0.1, 0.2, 0.4, … 5."""
    return float(min(ATTEMPT_PAUSE_S * 2.0 ** min(failures - 1, 16), ATTEMPT_PAUSE_MAX_S))


class Attempts:
    """One loop's steps by name. `also`: errors of the loop's own that are treated like a shortage."""

    def __init__(
        self, loop: str, *, clock: Callable[[], float] = time.monotonic, also: tuple[type[Exception], ...] = ()
    ) -> None:
        self._loop, self._clock, self._also = loop, clock, also
        self._failed: dict[str, tuple[int, float]] = {}  # step -> (failures in a row, when it is due again)

    def run(self, work: Callable[[], object], step: str = "turn") -> bool:
        """Do the step, unless the pause after its last failure is not over. Whether it was done."""
        return self.wait_s(step) <= 0.0 and self.once(work, step)

    def once(self, work: Callable[[], object], step: str) -> bool:
        """The same for a step that is not repeated: done now, whatever failed before."""
        failures, _ = self._failed.get(step, (0, 0.0))
        try:
            work()
        except Exception as error:
            if not isinstance(error, self._also) and not is_shortage(error):
                raise
            pause = pause_s(failures + 1)
            self._failed[step] = failures + 1, self._clock() + pause
            log.warning("step_failed", loop=self._loop, step=step, error=str(error) or repr(error), retry_s=pause)
            return False
        if failures:
            self._failed.pop(step, None)
            log.info("step_succeeded_again", loop=self._loop, step=step, failures=failures)
        return True

    def wait_s(self, step: str = "turn") -> float:
        """How long until the step is due again; 0 if it has not failed."""
        return max(0.0, self._failed[step][1] - self._clock()) if step in self._failed else 0.0
