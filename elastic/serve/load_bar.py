"""What `elastic serve` shows while ranks load: a bar per rank, at a terminal only. All else gets lines (`say`)."""

from __future__ import annotations

import sys
from typing import Any, Self

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn


class RankLoad(msgspec.Struct, frozen=True):
    """One rank's load, as /readyz has it."""

    rank: int
    bytes: int
    total: int


class LoadBar:
    """A context manager; its bars go at its end, or with their ranks' loads."""

    def __init__(self, console: Console | None = None) -> None:
        columns = TextColumn("rank {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        self._console = console or Console(file=sys.stderr)
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._tasks: dict[int, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bars.stop()

    def show(self, loads: tuple[RankLoad, ...]) -> None:
        """Draw these loads, and no others."""
        for rank in self._tasks.keys() - {load.rank for load in loads}:
            self._bars.remove_task(self._tasks.pop(rank))
        for load in loads:
            if load.rank not in self._tasks:
                self._tasks[load.rank] = self._bars.add_task(str(load.rank))
            self._bars.update(self._tasks[load.rank], completed=load.bytes, total=load.total)
