"""A client's event loop in a thread of its own, until it is stopped: what every load that runs beside faults is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from membership.base.errors import WaitTimeout


class Background:
    """Runs `main` in a thread. `main` begins nothing more once `stopping` is set, and ends with what is under way."""

    def __init__(self, name: str, main: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self.stopping = threading.Event()
        self._name, self._main = name, main
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float, under_way: Callable[[], object]) -> None:
        """Set `stopping` and wait for the end. WaitTimeout names what is `under_way`; what ended `main` is raised."""
        self.stopping.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise WaitTimeout(f"{self._name} did not end within {timeout_s:.0f} s: {under_way()}")
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - raised by `stop`
            self._failure = error
