"""Which ranks do not reach each other though the engine reaches both: pure, by what ranks say with their answers.

A rank that ends is missed by its peers, too, for a moment: a link counts as cut once two answers in a row have said so,
and neither side was masked meanwhile. A rank without requests answers no step, and so says nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple


class Changes(NamedTuple):
    """Peers of one rank."""

    lost: list[int]
    back: list[int]


class CutLinks:
    """The cut links of one view, each seen from one side."""

    def __init__(self) -> None:
        self._missed: dict[int, frozenset[int]] = {}  # by each rank, in its last answer
        self._cut: dict[int, frozenset[int]] = {}

    def answered(self, rank: int, unlinked: Iterable[int], masked: Collection[int]) -> Changes:
        """What this answer of a rank changes, if these ranks are masked."""
        gone = frozenset(masked)
        missed, before = frozenset(unlinked) - gone, self._cut.get(rank, frozenset()) - gone
        lost = (missed & self._missed.get(rank, frozenset())) - before
        self._missed[rank], self._cut[rank] = missed, (before & missed) | lost
        return Changes(sorted(lost), sorted(before - missed))

    def adopt(self, members: Collection[int]) -> None:
        """Another view: what is known of ranks that are not in it is forgotten."""
        self._missed.clear()
        self._cut = {rank: peers & frozenset(members) for rank, peers in self._cut.items() if rank in members}
