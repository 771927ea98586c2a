"""Reads of dead ranks' KV pools that begin amid a step, in a thread beside it.

A rank dies while the others compute, and what it had computed is wanted for the very next step. Blocks that are read
into belong to no sequence of the step under way (the engine sees to that), and copies leave the interpreter's lock, so
that the step goes on. What comes after such a read in the engine's queue waits for it, as if it had been done in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from membership.base.attempts import is_shortage
from membership.base.errors import WaitTimeout
from membership.base.timing import EARLY_READ_TIMEOUT_S


class EarlyReads:
    """Of one rank. `begin`, `settle` and `close` are its main thread's."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._begun: list[Future[None]] = []

    def begin(self, read: Callable[[], None]) -> bool:
        """Have it done, after those begun before; False if there is no thread for it."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "early-reads")
        try:
            self._begun.append(self._pool.submit(read))
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            return False
        return True

    def settle(self) -> None:
        """Wait for all that were begun; their errors are raised here. WaitTimeout."""
        while self._begun:
            try:
                self._begun.pop(0).result(EARLY_READ_TIMEOUT_S)
            except TimeoutError:
                raise WaitTimeout(f"a read of a KV pool has not ended after {EARLY_READ_TIMEOUT_S} s") from None

    def close(self) -> None:
        """End the thread, once what was begun has ended."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
