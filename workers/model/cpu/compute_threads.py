"""Threads that share the independent calls of one step, so that a rank whose host has idle cores uses them.

Each call runs whole in one thread, whose products have one thread as ever: so how many threads share does not show in
any bit. The caller takes calls itself and waits only for those that a helper has begun: where all cores are busy, it
loses nothing to a helper that gets none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from membership.base.attempts import is_shortage
from membership.base.timing import EXCHANGE_ANSWER_TIMEOUT_S

MOST = 4  # more would mostly wait for the interpreter's lock
LEAST = 4_000_000  # multiply-adds of a call, 50 us: less than that takes to wake a helper
MEMORY_ROWS = 16  # a product of fewer rows takes about as long as one of these: as long as its weights are read
Item = TypeVar("Item")
Result = TypeVar("Result")


def product_work(rows: int, weights: int) -> int:
    """What multiplying rows with so many weights is worth, in multiply-adds."""
    return max(rows, MEMORY_ROWS) * weights


class ComputeThreads:
    """The calling thread and its helpers, which start when they are first needed and end with `close`."""

    def __init__(self) -> None:
        self.count = 1  # that may compute now, the caller included; at most `MOST`
        self._pool: ThreadPoolExecutor | None = None

    def helps(self, work: int) -> bool:
        """Whether helpers would take calls of so many multiply-adds."""
        return self.count > 1 and work >= LEAST

    def sharing(self, work: int) -> int:
        """How many threads would take even parts of so many multiply-adds."""
        return self.count if self.helps(work // self.count) else 1

    def map(self, call: Callable[[Item], Result], items: Sequence[Item], work: int) -> list[Result]:
        """`call` of each item, in any thread and order; the results in the order of the items.

        `work`: the multiply-adds of each.
        """
        if len(items) < 2 or not self.helps(work):
            return [call(item) for item in items]
        if self._pool is None:
            # A thread has compute threads of its own until it asks how many: then as many as the main one, one.
            self._pool = ThreadPoolExecutor(MOST - 1, "compute", initializer=torch.get_num_threads)
        left, found = deque(enumerate(items)), dict[int, Result]()
        helpers: list[Future[None]] = []
        try:
            for _ in range(min(self.count, len(items)) - 1):
                helpers.append(self._pool.submit(_help, left, call, found))
        except RuntimeError as error:  # no thread is to be had: those that there are do it, or the caller alone
            if not is_shortage(error):
                raise
        try:
            _take(left, call, found)
        finally:
            left.clear()  # after an error there may be some
            for helper in helpers:
                if not helper.cancel():
                    helper.result(EXCHANGE_ANSWER_TIMEOUT_S)
        return [found[number] for number in range(len(items))]

    def close(self) -> None:
        """End the helpers."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _take(left: deque[tuple[int, Item]], call: Callable[[Item], Result], found: dict[int, Result]) -> None:
    while left:
        try:
            number, item = left.popleft()
        except IndexError:  # another thread has just taken the last one
            return
        found[number] = call(item)


@torch.inference_mode()
def _help(left: deque[Any], call: Callable[[Any], Any], found: dict[int, Any]) -> None:
    _take(left, call, found)
