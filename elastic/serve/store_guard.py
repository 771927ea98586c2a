"""Checks once per second that the store is still the same one. The supervisor rarely reads the store otherwise: roles
that it restarts begin with what it has seen, and the cluster's address file reports a replaced store.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from membership.base.attempts import Attempts
from membership.base.errors import StoreError, StoreReplaced, WaitTimeout
from membership.store.interface import Store

PERIOD_S = 1.0
CLOSE_TIMEOUT_S = 15.0

log = structlog.get_logger(__name__)


class StoreGuard:
    """Calls `on_replaced` once, in its own thread, if the store was wiped or set back."""

    def __init__(
        self, store: Store, key: str, on_replaced: Callable[[StoreReplaced], None], period_s: float = PERIOD_S
    ) -> None:
        self._store, self._key, self._on_replaced, self._period_s = store, key, on_replaced, period_s
        self._stop = threading.Event()
        self._attempts = Attempts("store guard")
        self._reported = False
        self._thread = threading.Thread(target=self._run, name="store-guard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop checking."""
        self._stop.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise WaitTimeout(f"the guard of the store did not end within {CLOSE_TIMEOUT_S:g} s")

    def _run(self) -> None:
        while not self._reported and not self._stop.wait(self._period_s):
            self._attempts.run(self._look)

    def _look(self) -> None:
        try:
            self._store.get(self._key)
        except StoreReplaced as replaced:
            self._on_replaced(replaced)
            self._reported = True
        except StoreError as error:
            log.debug("store_unavailable", error=str(error))
