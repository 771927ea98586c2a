"""Detects a store that was replaced: wiped, or set back to older data. Every answer carries store id and revision.

On a store that lost what we have seen, a controller would give out epochs and incarnations twice. So the first such
answer ends the use of this connection for good: the store may grow past the revision that we know and look right again,
and only a person can decide which data are the right ones.
"""

from __future__ import annotations

import threading

from membership.base.errors import ConfigError, StoreReplaced

HINT = (
    "serving goes on as it is, and membership is frozen. Bring the right data back, or keep what the store has now; "
    "then stop and start `elastic serve` (or every role)"
)


class Provenance:
    """What one client knows about its store: id and highest revision seen. Threads may share it."""

    def __init__(self, seen: str = "") -> None:
        """`seen`: what another process knows about the store, from its property `seen`; ConfigError if malformed."""
        self._lock = threading.Lock()
        self._replaced: StoreReplaced | None = None
        self._doubtful = False
        try:
            self._store_id, self._revision = (int(part, 16) for part in (seen or "0:0").split(":"))
        except ValueError as error:
            raise ConfigError(f"{seen!r} does not identify a store", hint="give ID:REVISION, in hex") from error

    @property
    def seen(self) -> str:
        """Store id and highest revision seen, for a process that starts later; empty if nothing was seen yet."""
        with self._lock:
            return f"{self._store_id:x}:{self._revision:x}" if self._store_id else ""

    @property
    def revision(self) -> int:
        """The highest revision seen."""
        return self._revision

    @property
    def doubtful(self) -> bool:
        """Whether the connection was lost since the last good read: probe the store before anything is written."""
        return self._doubtful

    def doubt(self) -> None:
        """Note that the connection was lost: another store may answer next."""
        self._doubtful = True

    def floor(self) -> int:
        """The lowest revision that a linearizable answer to a call made now may have. StoreReplaced if so noted."""
        with self._lock:
            if self._replaced is not None:
                raise self._replaced
            return self._revision

    def observed(self, store_id: int, revision: int = 0, floor: int = 0, *, settled: bool = False) -> None:
        """Note an answer; StoreReplaced if it is from another store, or its revision is below `floor`.

        `settled`: it answered a read, which ends `doubtful`.
        """
        with self._lock:
            if self._replaced is None:
                if self._store_id and store_id != self._store_id:
                    was = (
                        f"the store was replaced: it was {self._store_id:x}, what answers now is {store_id:x} (wiped?)"
                    )
                    self._replaced = StoreReplaced(was, hint=HINT)
                elif revision < floor:
                    was = f"the store went back from revision {floor} to {revision} (wiped, or an older copy?)"
                    self._replaced = StoreReplaced(was, hint=HINT)
            if self._replaced is not None:
                raise self._replaced
            self._store_id, self._revision = store_id, max(self._revision, revision)
            if settled:
                self._doubtful = False
