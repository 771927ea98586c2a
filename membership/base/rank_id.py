"""The identity of one rank process: its slot and its incarnation. A restart fills the same slot under a new one."""

from __future__ import annotations

from typing import NamedTuple

NO_SLOT = -1
"""What log lines, failpoints and a worker's context show as the rank of a process that has no slot yet."""


class RankId(NamedTuple):
    """`rank` is the slot, stable and never renumbered; `incarnation` is unique and never given out twice."""

    rank: int
    incarnation: int

    @property
    def slot(self) -> int:
        """The same as `rank`."""
        return self.rank

    def __str__(self) -> str:
        return f"rank {self.rank} (incarnation {self.incarnation})"


class SpareId(NamedTuple):
    """A rank process without a slot. `number` is its agent's, unique over the agent's episode."""

    number: int

    @property
    def slot(self) -> int:
        """NO_SLOT: it has none until it becomes a rank."""
        return NO_SLOT

    def __str__(self) -> str:
        return f"spare {self.number}"


ProcessId = RankId | SpareId


def labels(process: ProcessId) -> tuple[int, int]:
    """(rank, incarnation) as log lines and a worker's context show them: a spare's are NO_SLOT and its number."""
    return process if isinstance(process, RankId) else (NO_SLOT, process.number)
