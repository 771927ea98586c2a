"""When a rank reports how often its rows asked for each expert. Pure.

For 58 layers of 256 experts a report is 59 kB, and all of them go to one engine, which judges a sliding minute. So it
gets a steady number of them a second however many ranks there are, and not all in the same step.
"""

from __future__ import annotations

from membership.base.timing import LOAD_REPORT_S

AT_ONCE = 16  # ranks that may report within LOAD_REPORT_S; of more, each reports less often


class LoadTurns:
    """Of one rank."""

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None  # the number of ranks, and the number of the turn at the last step

    def due(self, now: float, rank: int, ranks: int) -> bool:
        """Whether to report with this step. At once with the first one.

        A change of the number of ranks begins other turns, not a report: all would come in the step after a death.
        """
        every_s = LOAD_REPORT_S * max(1.0, ranks / AT_ONCE)
        turn = ranks, int(now / every_s + rank / max(1, ranks))
        before, self._last = self._last, turn
        return before is None or (before[0] == ranks and before != turn)
