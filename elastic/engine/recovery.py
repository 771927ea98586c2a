"""How long a lost rank was felt: from its detection until every request that lived there has a new token. Pure."""

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
    """One rank's loss is made good."""

    rank: int
    ms: float
    moved: int  # requests that lived on it


class Recovery:
    """The losses that are still felt."""

    def __init__(self) -> None:
        self._open: list[_Recovering] = []

    def lost(self, rank: int, detected_at: float, moved: Iterable[str]) -> None:
        """A rank was lost, and these requests with it."""
        requests = set(moved)
        self._open.append(_Recovering(rank, detected_at, requests, len(requests)))

    def progress(self, emitted: Iterable[str], under_way: Callable[[str], bool], now: float) -> list[Recovered]:
        """These requests have new tokens; `under_way` says which still run. Returns what is over now."""
        if not self._open:
            return []
        renewed = set(emitted)
        for loss in self._open:
            loss.requests = {name for name in loss.requests - renewed if under_way(name)}
        over = [loss for loss in self._open if not loss.requests]
        self._open = [loss for loss in self._open if loss.requests]
        return [Recovered(loss.rank, (now - loss.detected_at) * 1000, loss.moved) for loss in over]
