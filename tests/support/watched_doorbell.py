"""A doorbell that lets a test act when its rank has to wait: before each look it calls `on_wait`."""

from __future__ import annotations

from collections.abc import Callable

from workers.ipc.doorbell import Doorbell


class WatchedDoorbell(Doorbell):
    """Everything else is as in the product."""

    def __init__(self) -> None:
        super().__init__()
        self.on_wait: Callable[[], None] = lambda: None

    def wait(self, ready: Callable[[], object], timeout_s: float) -> bool:
        """See Doorbell."""

        def look() -> object:
            self.on_wait()
            return ready()

        return super().wait(look, timeout_s)
