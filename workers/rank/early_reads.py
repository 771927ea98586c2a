"""Reads of dead ranks' KV pools that begin amid a step, in a thread beside it.

A rank dies while the others compute, and what it had computed is wanted for the very next step. Blocks that are read
into belong to no sequence of the step under way (the engine sees to that), and copies leave the interpreter's lock, so
that the step goes on. What comes after such a read in the engine's queue waits for it, as if it had been done in turn.

A thread of our own, not an executor: that takes the work before it starts its thread, and does it with the next one if
it could not. By then the blocks may be another's, and live. The interpreter's exit would wait for its thread, too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from membership.base.attempts import is_shortage
from membership.base.errors import WaitTimeout
from membership.base.timing import EARLY_READ_TIMEOUT_S

IDLE_S = 10.0


class EarlyReads:
    """Of one rank. `begin`, `settle` and `close` are its main thread's."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._given: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._begun: deque[Future[None]] = deque()

    def begin(self, read: Callable[[], None]) -> bool:
        """Have it done, after those begun before; False if there is no thread for it: then it is not done here."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="early-reads", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if not is_shortage(error):
                    raise
                return False
            self._thread = thread
        done: Future[None] = Future()
        self._begun.append(done)
        self._given.put((read, done))
        return True

    def settle(self) -> None:
        """Wait for all that were begun; their errors are raised here. WaitTimeout."""
        while self._begun:
            try:
                self._begun.popleft().result(EARLY_READ_TIMEOUT_S)
            except TimeoutError:
                raise WaitTimeout(f"a read of a KV pool has not ended after {EARLY_READ_TIMEOUT_S} s") from None

    def close(self) -> None:
        """End the thread, once what was begun has ended. One that does not ends with the process."""
        if self._thread is not None:
            self._given.put(None)
            self._thread.join(EARLY_READ_TIMEOUT_S)
            self._thread = None

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
