"""Loads the model in a thread of its own, so that the rank's main thread goes on answering its agent and its engine.

So a load may take as long as it takes: no ping, no engine's handshake and no full queue waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from membership.base.errors import WaitTimeout
from workers.ipc.cpu_priority import at_low_priority
from workers.protocol.load_progress import LoadProgress
from workers.rank.environment import give_memory_back, keep_for_steps


class Loading:
    """One load; an `AsyncOutput`. `load` runs in the thread and returns the output."""

    def __init__(self, load: Callable[[], Any], progress: LoadProgress, *, low_priority: bool) -> None:
        self._load, self._progress, self._low_priority = load, progress, low_priority
        self._error: BaseException | None = None
        self._value: Any = None
        self._thread = threading.Thread(target=self._run, name="load-model", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether it ended with an error, and may be tried again."""
        return self._error is not None and not self._thread.is_alive()

    def get_output(self, timeout_s: float) -> Any:
        """What `load` returned, or its error."""
        self.join(timeout_s)
        if self._error is not None:
            raise self._error
        return self._value

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end. WaitTimeout: it still loads."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise WaitTimeout(f"the model was not loaded within {timeout_s:g} s")

    def _run(self) -> None:
        if self._low_priority:
            at_low_priority()
        try:
            with self._progress.loading():
                self._value = self._load()
            give_memory_back()
            keep_for_steps()
        except BaseException as error:  # noqa: BLE001 - raised by get_output
            self._error = error
