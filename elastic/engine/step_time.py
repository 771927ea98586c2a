"""How long the next step will take, by what the last one took and by how many ranks compute it. Pure.

Ranks share what a step computes: experts above all, for the requests of each of them. So a step's work is counted in
seconds of ranks, and the fewer there are, the longer it takes. Of a step that lost a rank amid it, both parts count.
"""

from __future__ import annotations


class StepTime:
    """Of the last step that was answered."""

    def __init__(self) -> None:
        self._since, self._ranks = 0.0, 0  # of the step under way, since so many ranks compute it
        self._before = 0.0  # seconds of ranks until then
        self._work = 0.0  # seconds of ranks of the last answered one

    def begin(self, now: float, ranks: int) -> None:
        """So many ranks begin a step."""
        self._since, self._ranks, self._before = now, ranks, 0.0

    def left(self, now: float, ranks: int) -> None:
        """So many are left of them."""
        self._before += (now - self._since) * self._ranks
        self._since, self._ranks = now, ranks

    def answered(self, now: float) -> None:
        """By one of them, maybe the last."""
        self._work = self._before + (now - self._since) * self._ranks

    def expected_s(self, ranks: int) -> float:
        """Of the next one, by so many ranks; 0 while nothing is known."""
        return self._work / max(1, ranks)
