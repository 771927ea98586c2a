"""What this gateway sent to clients in each of the last seconds, for the live page: tokens, ends, the longest gap."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec

KEPT_S = 300


class Second(msgspec.Struct, kw_only=True):
    """One second with something in it. `gap_ms`: the longest wait of a stream for its next token that ended then."""

    at: int
    tokens: int = 0
    ended: int = 0
    gap_ms: float = 0.0


class Traffic:
    """The last five minutes. A second without tokens costs nothing and is left out."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._seconds: deque[Second] = deque(maxlen=KEPT_S)

    def sent(self, tokens: int, gap_s: float) -> None:
        """Tokens that a stream got now. `gap_s`: since its last ones; 0 if they are its first."""
        second = self._now()
        second.tokens += tokens
        if gap_s * 1000 > second.gap_ms:  # once per token: rounded only where it counts
            second.gap_ms = round(gap_s * 1000, 1)

    def ended(self) -> None:
        """A stream has ended."""
        self._now().ended += 1

    def since(self, after: int) -> list[Second]:
        """The seconds later than `after` that are over and not older than what is kept."""
        now = int(self._clock())
        return [second for second in self._seconds if max(after + 1, now - KEPT_S) <= second.at < now]

    def _now(self) -> Second:
        at = int(self._clock())
        if not self._seconds or self._seconds[-1].at < at:
            self._seconds.append(Second(at=at))
        return self._seconds[-1]
