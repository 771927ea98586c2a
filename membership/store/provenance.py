"""Which store this is. Every answer tells; one that was wiped or set back is refused, instead of being believed.

Answers about a store that lost what we have seen would make a controller give out epochs and incarnations twice. So the
first such answer ends the use of this connection for good: the store may fill up past the revision we know and look
right again, and only a person can say which data are the right ones.
"""

from __future__ import annotations

import threading

from membership.base.errors import ConfigError, StoreReplaced

HINT = (
    "serving goes on as it is, and membership is frozen. Bring the right data back, or keep what the store has now; "
    "then stop and start `elastic serve` (or every role)"
)


class Provenance:
    """What one client knows of its store: the id, and the highest revision seen. Threads may share it."""

    def __init__(self, seen: str = "") -> None:
        """Begin with what another process has seen, if given: see `seen`."""
        self._lock = threading.Lock()
        self._replaced: StoreReplaced | None = None
        self._doubtful = False
        try:
            self._store_id, self._revision = (int(part, 16) for part in (seen or "0:0").split(":"))
        except ValueError as error:
            raise ConfigError(f"{seen!r} is not what a store was known by", hint="give ID:REVISION, in hex") from error

    @property
    def seen(self) -> str:
        """Store id and highest revision seen, for a process that starts later; empty if nothing was seen yet."""
        with self._lock:
            return f"{self._store_id:x}:{self._revision:x}" if self._store_id else ""

    @property
    def doubtful(self) -> bool:
        """Whether the connection was lost since the last good answer to a read: ask before anything is changed."""
        return self._doubtful

    def doubt(self) -> None:
        """The connection was lost: what answers next may be another store."""
        self._doubtful = True

    def floor(self) -> int:
        """The least revision that a linearizable answer to a question asked now must have. StoreReplaced if known."""
        with self._lock:
            if self._replaced is not None:
                raise self._replaced
            return self._revision

    def observed(self, store_id: int, revision: int = 0, floor: int = 0, *, settled: bool = False) -> None:
        """Take note of an answer; StoreReplaced if it comes from another store, or from below `floor`.

        `settled`: it answered a read, which may end a doubt.
        """
        with self._lock:
            if self._replaced is None:
                if self._store_id and store_id != self._store_id:
                    self._replaced = _wiped(self._store_id, store_id)
                elif revision < floor:
                    self._replaced = _set_back(floor, revision)
            if self._replaced is not None:
                raise self._replaced
            self._store_id, self._revision = store_id, max(self._revision, revision)
            if settled:
                self._doubtful = False


def _wiped(known: int, found: int) -> StoreReplaced:
    return StoreReplaced(f"the store was replaced: it was {known:x}, what answers now is {found:x} (wiped?)", hint=HINT)


def _set_back(known: int, found: int) -> StoreReplaced:
    return StoreReplaced(f"the store went back from revision {known} to {found} (wiped, or an older copy?)", hint=HINT)
