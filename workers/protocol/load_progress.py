"""How far a rank has loaded: words of its liveness page, which its agent and the engine read at any time.

A load has no deadline, as it takes what its disk takes. Instead `marks` must rise: with each piece of bytes, and with
each piece of other work that a load needs (kernels are measured, peers are linked). While the rank is `loading` its
agent watches that (`--load-stall`), and the engine expects no ping.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

WORDS = 4
_LOADING, _DONE, _TOTAL, _MARKS = range(WORDS)


class LoadStopped(Exception):
    """The load is not wanted any more."""


class LoadSeen(NamedTuple):
    """What one look at a rank's words saw. Bytes are of the load under way, else of the last one."""

    loading: bool
    done: int
    total: int
    marks: int


def seen(words: memoryview[int]) -> LoadSeen:
    """Read the words; those of a rank may be read by any process."""
    return LoadSeen(bool(words[_LOADING]), words[_DONE], words[_TOTAL], words[_MARKS])


class LoadProgress:
    """The rank's own side. Safe to use from several threads: a load may begin while an older one is given up."""

    def __init__(self, words: memoryview[int] | None = None) -> None:
        self._words = memoryview(bytearray(8 * WORDS)).cast("Q") if words is None else words
        self._lock = threading.Lock()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within it this rank loads. What is to be loaded is said by `expect`."""
        with self._lock:
            if not self._words[_LOADING]:
                self._words[_DONE] = self._words[_TOTAL] = 0
            self._words[_LOADING] += 1
            self._words[_MARKS] += 1
        try:
            yield
        finally:
            with self._lock:
                self._words[_LOADING] -= 1
                self._words[_MARKS] += 1

    def expect(self, nbytes: int) -> None:
        """So much more is to be loaded."""
        with self._lock:
            self._words[_TOTAL] += nbytes
            self._words[_MARKS] += 1

    def add(self, nbytes: int) -> None:
        """So much of it is there, whether it was read or mapped."""
        with self._lock:
            self._words[_DONE] += nbytes
            self._words[_MARKS] += 1

    def mark(self) -> None:
        """A piece of work that has no bytes is done."""
        self.add(0)
