"""A campaign of cells: one fault each, on one cluster under load, each followed by a whole cluster and a check."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from chaos.campaigns.campaign import WHOLE_S, Campaign
from chaos.workload.history import RequestRecord, broke_off, compare
from chaos.workload.streams import Workload
from membership.base.errors import ElasticError

Cell = TypeVar("Cell")
Result = TypeVar("Result")


@dataclass(kw_only=True)
class Matrix(Campaign, Generic[Cell, Result]):
    """Runs the cells that are `left`, until one leaves the cluster in a state from which no other can start."""

    left: list[Cell]
    results: list[Result] = field(default_factory=list)
    over: bool = False
    _checked: int = 0  # requests

    @abstractmethod
    def cell(self, cell: Cell) -> Result:
        """Run one; what does not hold is in the result."""

    @abstractmethod
    def words(self, result: Result) -> str:
        """A result for people."""

    def next(self) -> Cell:
        """Take the next cell."""
        return self.left.pop(0)

    def act(self, workload: Workload) -> None:
        """Cell after cell."""
        total = len(self.results) + len(self.left)
        while self.left and not self.over:
            result = self.cell(self.next())
            self.results.append(result)
            self.notify(f"{len(self.results)}/{total} {self.words(result)}")

    def wait_whole(self, within_s: float = WHOLE_S) -> None:
        """Before the first cell; each cell waits for it by itself."""
        if not self.results:
            super().wait_whole(within_s)

    def fail(self, error: ElasticError) -> None:
        """A cell never raises: this is a fault of the matrix itself."""
        raise error

    def new_requests(self, may_break_off: Callable[[RequestRecord], bool]) -> tuple[int, list[str], int]:
        """The requests that have ended since the last call: how many, what is wrong, how many broke off as they may."""
        records = self.workload.records() if self.workload is not None else []
        new, self._checked = records[self._checked :], len(records)
        return (len(new), *misfits(new, self.oracle, may_break_off))


def misfits(
    records: list[RequestRecord], oracle: dict[int, RequestRecord], may_break_off: Callable[[RequestRecord], bool]
) -> tuple[list[str], int]:
    """What is wrong with these requests, and how many merely broke off. Pure.

    `may_break_off`: whether a request's gateway had a fault; then it may end early, but what it brought is right.
    """
    rest = [record for record in records if not (may_break_off(record) and broke_off(record, oracle[record.prompt]))]
    return compare(rest, oracle).explained(len(rest)), len(records) - len(rest)
