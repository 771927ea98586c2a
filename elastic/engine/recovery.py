"""Time to recover from a lost rank: from its detection until each of its requests has a new token. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass
class _Recovering:
    rank: int
    detected_at: float
    requests: set[str]
    moved: int


@dataclass(frozen=True)
class Recovered:
    """Recovery from one rank's loss is complete."""

    rank: int
    ms: float
    moved: int  # requests that were on it


class Recovery:
    """The losses whose recovery is not complete."""

    def __init__(self) -> None:
        self._open: list[_Recovering] = []

    def lost(self, rank: int, detected_at: float, moved: Iterable[str]) -> None:
        """A rank was lost, and these requests with it."""
        requests = set(moved)
        self._open.append(_Recovering(rank, detected_at, requests, len(requests)))

    def progress(self, emitted: Iterable[str], under_way: Callable[[str], bool], now: float) -> list[Recovered]:
        """Return the recoveries that these new tokens complete; `under_way` says which requests still run."""
        if not self._open:
            return []
        renewed = set(emitted)
        for loss in self._open:
            loss.requests = {name for name in loss.requests - renewed if under_way(name)}
        over = [loss for loss in self._open if not loss.requests]
        self._open = [loss for loss in self._open if loss.requests]
        return [Recovered(loss.rank, (now - loss.detected_at) * 1000, loss.moved) for loss in over]
