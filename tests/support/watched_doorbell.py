"""A doorbell that lets a test act when its rank has to wait: before each look it calls `on_wait`."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

from tests.support.helpers import eventually
from workers.ipc.doorbell import Doorbell

_made: WeakSet[Doorbell] = WeakSet()


def eventually_read(check: Callable[[], object], within_s: float, what: str) -> object:
    """`eventually`, while the sockets of all these doorbells are read, as the ranks that wait would do."""

    def looked() -> object:
        for bell in _made:
            bell.look()
        return check()

    return eventually(looked, within_s, what)


class WatchedDoorbell(Doorbell):
    """Everything else is as in the product."""

    def __init__(self) -> None:
        super().__init__()
        _made.add(self)
        self.on_wait: Callable[[], None] = lambda: None

    def close(self) -> None:
        """See Doorbell."""
        _made.discard(self)
        super().close()

    def wait(self, ready: Callable[[], object], timeout_s: float) -> bool:
        """See Doorbell."""

        def look() -> object:
            self.on_wait()
            return ready()

        return super().wait(look, timeout_s)
