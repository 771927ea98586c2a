"""Time to recover from a lost rank: from its detection until each of its requests has a new token, and of what it was
made up. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass
class _Recovering:
    rank: int
    detected_at: float
    requests: set[str]
    moved: int
    in_flight_over: float | None = None  # when the step ended that was under way then
    next_began: float | None = None
    steps: int = 0  # that ran since, that one included


@dataclass(frozen=True)
class Recovered:
    """Recovery from one rank's loss is complete."""

    rank: int
    ms: float
    moved: int  # requests that were on it
    steps: int = 0  # until then; the first may have been under way
    in_flight_ms: float = 0.0  # what was left of that one
    wait_ms: float = 0.0  # from then until the next one began, for a home and for what the dead rank had left


class Recovery:
    """The losses whose recovery is not complete."""

    def __init__(self) -> None:
        self._open: list[_Recovering] = []

    @property
    def ranks(self) -> tuple[int, ...]:
        """The lost ones."""
        return tuple(sorted({loss.rank for loss in self._open}))

    def lost(self, rank: int, detected_at: float, moved: Iterable[str]) -> None:
        """A rank was lost, and these requests with it."""
        requests = set(moved)
        self._open.append(_Recovering(rank, detected_at, requests, len(requests)))

    def step_began(self, now: float) -> None:
        """All ranks have a step to compute."""
        for loss in self._open:
            loss.next_began = now if loss.next_began is None else loss.next_began
            loss.steps += 1

    def step_ended(self, now: float) -> None:
        """All ranks that are left have answered it."""
        for loss in self._open:
            if loss.next_began is None and loss.in_flight_over is None:
                loss.in_flight_over = now
                loss.steps += 1

    def progress(self, emitted: Iterable[str], under_way: Callable[[str], bool], now: float) -> list[Recovered]:
        """Return the recoveries that these new tokens complete; `under_way` says which requests still run."""
        if not self._open:
            return []
        renewed = set(emitted)
        for loss in self._open:
            loss.requests = {name for name in loss.requests - renewed if under_way(name)}
        over = [loss for loss in self._open if not loss.requests]
        self._open = [loss for loss in self._open if loss.requests]
        return [_recovered(loss, now) for loss in over]


def _recovered(loss: _Recovering, now: float) -> Recovered:
    over = loss.detected_at if loss.in_flight_over is None else loss.in_flight_over
    began = over if loss.next_began is None else loss.next_began
    total, in_flight, wait = (1000 * span for span in (now - loss.detected_at, over - loss.detected_at, began - over))
    return Recovered(loss.rank, total, loss.moved, loss.steps, in_flight, wait)
