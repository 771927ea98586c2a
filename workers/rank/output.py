"""The thread in which a rank waits for outputs that are still being made, so that its main thread goes on stepping."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from membership.base.attempts import started
from membership.base.errors import WaitTimeout
from workers.protocol.rpc import failure_of
from workers.rank.worker_api import AsyncOutput

SLICE_S = 0.25
STOP_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Waiting:
    """One output, until when to wait for it, and what to call with it (or the failure) then."""

    output: AsyncOutput
    deadline: float
    deliver: Callable[[Any], None]


class OutputThread:
    """Waits for outputs in the order they were given; started with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Waiting] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def put(self, output: AsyncOutput, timeout_s: float, deliver: Callable[[Any], None]) -> None:
        """Call `deliver` in the thread with the output's result, or with a Failure; here, if there is no thread."""
        waiting = Waiting(output, time.monotonic() + timeout_s, deliver)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            if not started(thread):
                return self._wait_for(waiting)
            self._thread = thread
        self._queue.put(waiting)

    def close(self) -> None:
        """Stop; an output that is still not there is given up."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=STOP_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                waiting = self._queue.get(timeout=SLICE_S)
            except queue.Empty:
                continue
            self._wait_for(waiting)

    def _wait_for(self, waiting: Waiting) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            left = waiting.deadline - begun
            try:
                value = waiting.output.get_output(timeout_s=min(SLICE_S, max(0.0, left)))
            except WaitTimeout as error:
                if left > SLICE_S and time.monotonic() - begun >= SLICE_S / 2:
                    continue  # only our slice is over
                value = failure_of(error, traceback.format_exc())
            except Exception as error:  # noqa: BLE001 - whatever the output failed with goes to the caller
                value = failure_of(error, traceback.format_exc())
            return waiting.deliver(value)
