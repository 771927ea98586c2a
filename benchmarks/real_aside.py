"""Other engines beside ours in `real.py`, each in a process of its own that computes only while it is asked to."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

DEADLINE_S = 300.0
CONTEXT = 32  # of the streams that they decode
Main = Callable[[Connection, str, int], None]


class Aside:
    """Owns the process, which runs `main` with a pipe, the model's path and its number of threads; a context manager.

    It answers "ready", then to each (streams, steps, tokens) seconds: of each step of so many streams, or with 0
    streams of a prefill of the tokens.
    """

    def __init__(self, name: str, main: Main, path: str, threads: int, ready_s: float = DEADLINE_S) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, path, threads), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive(ready_s)
        except BaseException:
            self.__exit__()  # else it would compute beside all that is measured
            raise

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join(30.0)
        self._pipe.close()

    def decode(self, streams: int, steps: int) -> list[float]:
        """Seconds of each step of these many streams, which go on where they were."""
        return self._ask((streams, steps, []))

    def prefill(self, tokens: list[int]) -> float:
        """Seconds to the first token."""
        return self._ask((0, 1, tokens))[0]

    def _ask(self, asked: tuple[int, int, list[int]]) -> list[float]:
        self._pipe.send(asked)
        found: list[float] = self._receive(DEADLINE_S)
        return found

    def _receive(self, deadline_s: float) -> Any:
        if not self._pipe.poll(deadline_s):
            raise TimeoutError(f"{self.name} did not answer within {deadline_s:.0f} s")
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.name} has ended") from None
