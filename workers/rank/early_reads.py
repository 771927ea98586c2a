"""Reads of dead ranks' KV pools that begin amid a step, in a thread beside it.

A rank dies while the others compute, and what it had computed is wanted for the very next step. Blocks that are read
into belong to no sequence of the step under way (the engine sees to that), and copies leave the interpreter's lock, so
that the step goes on. What comes after such a read in the engine's queue waits for it, as if it had been done in turn.

A thread of our own, not an executor: that takes the work before it starts its thread, and does it with the next one if
it could not. By then the blocks may be another's, and live. The interpreter's exit would wait for its thread, too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import Empty, SimpleQueue

import structlog

from membership.base.attempts import started
from membership.base.timing import EARLY_READ_TIMEOUT_S

IDLE_S = 10.0

log = structlog.get_logger(__name__)


class EarlyReads:
    """Of one rank. `begin`, `settle` and `close` are its main thread's."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._given: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._begun: list[Future[None]] = []

    def begin(self, read: Callable[[], None]) -> bool:
        """Have it done, after those begun before; False if there is no thread for it: then it is not done here."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="early-reads", daemon=True)
            if not started(thread):
                return False
            self._thread = thread
        done: Future[None] = Future()
        self._begun.append(done)
        self._given.put((read, done))
        return True

    def settle(self) -> None:
        """Wait for all that were begun; their errors are raised here. A read that does not end ends this process."""
        while self._begun:
            if not wait(self._begun[:1], EARLY_READ_TIMEOUT_S).done:
                log.error("early_read_stuck", waited_s=EARLY_READ_TIMEOUT_S)
                os._exit(1)  # an error to the caller would not stop the thread, which may write into live blocks later
            self._begun.pop(0).result(0)

    def close(self) -> None:
        """End the thread, once what was begun has ended."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._given.put(None)
            self.settle()
            thread.join(EARLY_READ_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            try:
                given = self._given.get(timeout=IDLE_S)
            except Empty:
                continue
            if given is None:
                return
            read, done = given
            try:
                done.set_result(read())
            except BaseException as error:  # noqa: BLE001 - `settle` raises it
                done.set_exception(error)
