"""Every ordered pair of kinds of faults, one right after the other: a walk over all of them, cut into episodes.

The walk is an Eulerian circuit of the complete graph of kinds (with loops): each ordered pair is one of its edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from random import Random
from typing import Protocol

WINDOW = 3  # two faults count as a pair if the second is at most this many events later

Pair = tuple[str, str]


class Executed(Protocol):
    """A step of an episode: its kind, and what it did ("" if nothing)."""

    @property
    def kind(self) -> str: ...
    @property
    def outcome(self) -> str: ...


def walk(kinds: Sequence[str], part: int, length: int) -> list[str]:
    """The `part`-th piece of the walk, which ends where the next begins."""
    whole = _circuit(tuple(kinds))
    step = length - 1
    start = part * step % len(whole)
    return [whole[(start + i) % len(whole)] for i in range(length)]


def parts(kinds: Sequence[str], length: int) -> int:
    """The number of pieces of the whole walk."""
    return -(-(len(kinds) ** 2) // (length - 1))


@lru_cache(maxsize=4)
def _circuit(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Hierholzer's algorithm; the last kind, which is the first again, is left out. Always the same, but shuffled."""
    shuffle = Random(0)
    left = {kind: shuffle.sample(kinds, len(kinds)) for kind in kinds}
    path, stack = list[str](), [kinds[0]]
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            path.append(stack.pop())
    return tuple(reversed(path))[:-1]


def pairs_of(steps: Sequence[Executed], kinds: Iterable[str]) -> set[Pair]:
    """The ordered pairs of faults that met: both took effect, the second at most WINDOW events later."""
    known = set(kinds)
    real = [step.kind if step.outcome and step.kind in known else "" for step in steps]
    return {
        (first, second) for at, first in enumerate(real) if first for second in real[at + 1 : at + 1 + WINDOW] if second
    }
