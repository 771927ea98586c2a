"""Requests that wait for a place, oldest first, and how many of them may. Pure.

Of several API keys the least served one has the next place (`turns.py`), and one that fills the room leaves the others
their part of it. A request that no place will be free for in time is refused at once, with the time after which it is
worth asking again. One that an engine has taken on before (it ran, or its engine died) is never refused.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from enum import StrEnum

from elastic.engine.sequence import Sequence, by_age
from elastic.engine.turns import PROMPT_COST, Turns
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
        self._requests, self._tokens = Counter[str](), Counter[str]()  # that wait, by key
        self.turns = Turns()
        self.shed: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    @property
    def tokens(self) -> int:
        """Of all that wait."""
        return self._tokens.total()

    @property
    def first(self) -> Sequence | None:
        """Whose turn it is, if any waits: one that was interrupted, else the oldest of the least served key."""
        if len(self._requests) < 2:
            return self._waiting[0] if self._waiting else None
        oldest: dict[str, Sequence] = {}
        for each in self._waiting:
            if each.interrupted:
                return each
            oldest.setdefault(each.request.key, each)
        return min(oldest.values(), key=lambda each: self.turns.served(each.request.key))

    def first_of(self, some: Iterable[Sequence]) -> Sequence:
        """Whose turn it is of some that wait, in the same order."""

        def turn(each: Sequence) -> tuple[bool, int, int]:
            return not each.interrupted, self.turns.served(each.request.key), each.seq

        return min(some, key=turn)

    def add(self, sequence: Sequence) -> None:
        """Let it wait, in order of arrival."""
        insort(self._waiting, sequence, key=by_age)
        self._count(sequence.request.key, 1, len(sequence.tokens))

    def remove(self, sequence: Sequence) -> None:
        """It waits no more."""
        self._waiting.remove(sequence)
        self._count(sequence.request.key, -1, -len(sequence.tokens))

    def _count(self, key: str, requests: int, tokens: int) -> None:
        self._requests[key] += requests
        self._tokens[key] += tokens
        if not self._requests[key]:
            del self._requests[key], self._tokens[key]

    def place(self, sequence: Sequence, cached: int, now: float) -> None:
        """It has found a place, where so many of its tokens need not be computed."""
        self.remove(sequence)
        if not sequence.interrupted:
            self.turns.charge(sequence.request.key, PROMPT_COST * (len(sequence.tokens) - cached))
        sequence.taken = True
        self._placed.append(now)

    def full(self, request: Submit) -> Shed | None:
        """Why this one may not wait too, if so. With N keys 1 + 1/2 + ... + 1/N times the limit may wait: a key has its
        part though others, who came when there were fewer, have more."""
        config, tokens = self._config, len(request.prompt)
        if request.taken or request.emitted or not self._waiting:
            return None
        key, keys = request.key, len(self._requests.keys() | {request.key})
        most, most_tokens = config.max_waiting_requests, config.max_waiting_tokens
        if len(self._waiting) >= most and keys * self._requests[key] >= most:
            return Shed.REQUESTS
        if self.tokens + tokens > most_tokens and keys * (self._tokens[key] + tokens) > most_tokens:
            return Shed.TOKENS
        return None

    def late(self, now: float, since: float = -math.inf) -> list[Sequence]:
        """Those that have waited for too long. Since `since` there are places."""
        limit = now - self._config.max_wait_s
        return [each for each in self._waiting if not each.taken and max(each.submitted, since) <= limit]

    def retry_after_s(self, now: float) -> float:
        """In how long all that wait now have a place, as fast as they found one lately."""
        if not self._placed:
            return RETRY_AFTER_S
        took_s = max(now - self._placed[0], 1e-3)
        return min(max(len(self._waiting) * took_s / len(self._placed), RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
