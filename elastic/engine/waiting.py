"""Requests that wait for a place, oldest first, and how many of them may. Pure.

A request that no place will be free for in time is refused at once, with the time after which it is worth asking again.
One that an engine has taken on before (it ran, or its engine died) is never refused.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Iterator
from enum import StrEnum

from elastic.engine.sequence import Sequence, by_age
from elastic.protocol import Submit
from membership.base.timing import RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S, RETRY_AFTER_S
from membership.store.records import ClusterConfig

REMEMBERED = 128  # places found, of which the rate is measured


class Shed(StrEnum):
    """Why a request was refused: too many wait, too many tokens wait, or it waited for too long."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    WAIT = "wait"


class WaitingRoom:
    """`shed` counts refusals by reason."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._waiting: list[Sequence] = []
        self._placed: deque[float] = deque(maxlen=REMEMBERED)  # when the last ones found a place
        self.tokens = 0  # of all that wait
        self.shed: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    @property
    def oldest(self) -> Sequence | None:
        """The one that has waited longest, if any waits."""
        return self._waiting[0] if self._waiting else None

    def add(self, sequence: Sequence) -> None:
        """Let it wait, in order of arrival."""
        insort(self._waiting, sequence, key=by_age)
        self.tokens += len(sequence.tokens)

    def remove(self, sequence: Sequence) -> None:
        """It waits no more."""
        self._waiting.remove(sequence)
        self.tokens -= len(sequence.tokens)

    def place(self, sequence: Sequence, now: float) -> None:
        """It has found a place."""
        self.remove(sequence)
        sequence.taken = True
        self._placed.append(now)

    def full(self, request: Submit) -> Shed | None:
        """Why this one may not wait too, if so."""
        config, tokens = self._config, len(request.prompt)
        if request.taken or request.emitted or not self._waiting:
            return None
        if len(self._waiting) >= config.max_waiting_requests:
            return Shed.REQUESTS
        return Shed.TOKENS if self.tokens + tokens > config.max_waiting_tokens else None

    def late(self, now: float) -> list[Sequence]:
        """Those that have waited for too long."""
        limit = now - self._config.max_wait_s
        return [each for each in self._waiting if not each.taken and each.submitted <= limit]

    def retry_after_s(self, now: float) -> float:
        """In how long all that wait now have a place, as fast as they found one lately."""
        if not self._placed:
            return RETRY_AFTER_S
        took_s = max(now - self._placed[0], 1e-3)
        return min(max(len(self._waiting) * took_s / len(self._placed), RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
