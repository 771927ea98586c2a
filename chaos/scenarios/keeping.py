"""Who keeps what a run has seen: the recorder, which also asks the store, or a notebook, where that is out of reach."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from chaos.faults.base import Injected
from chaos.record.record import Answered, AnyLine, Dealt, Expected, Happened, Header, Verified, write
from chaos.record.recorder import Recorder
from chaos.scenarios.verdict import Played
from chaos.target.stage import LocalStage, Stage
from chaos.workload.history import RequestRecord
from membership.base.events import Event


class Keeper(Protocol):
    """What a run tells; `chaos/record/recorder.py` is one."""

    def dealt(self, fault: Injected) -> None: ...
    def healed(self, fault: Injected) -> None: ...
    def expected(self, oracle: Iterable[RequestRecord]) -> None: ...
    def answered(self, requests: Iterable[RequestRecord]) -> None: ...
    def verified(self, promise: str, ok: bool, said: str) -> None: ...
    def write(self, path: Path) -> None: ...


class Notebook:
    """Keeps only what it is told: of a deployment whose store is out of reach."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._lines: list[AnyLine] = []
        self._faults: dict[Injected, float] = {}

    def dealt(self, fault: Injected) -> None:
        """A fault was seen to happen."""
        self._faults[fault] = 0.0

    def healed(self, fault: Injected) -> None:
        """It was taken back."""
        self._faults[fault] = time.time()

    def expected(self, oracle: Iterable[RequestRecord]) -> None:
        """The fault-free run."""
        self._lines += [Expected(record=record) for record in oracle]

    def answered(self, requests: Iterable[RequestRecord]) -> None:
        """Requests of the run."""
        self._lines += [Answered(record=record) for record in requests]

    def happened(self, events: Iterable[Event]) -> None:
        """The cluster's history, as far as it is of this run."""
        self._lines += [Happened(event=event) for event in events if event.ts >= self.header.started]

    def verified(self, promise: str, ok: bool, said: str) -> None:
        """What the run itself has found out about a promise."""
        self._lines.append(Verified(promise=promise, ok=ok, said=said))

    def lines(self) -> Iterator[AnyLine]:
        """The record, the header first."""
        yield self.header
        yield from (Dealt(fault=fault, healed_at=healed_at) for fault, healed_at in self._faults.items())
        yield from self._lines

    def write(self, path: Path) -> None:
        """The record as a file."""
        write(path, self.lines())


@contextmanager
def keeping(stage: Stage, played: Played, *, recorded: bool) -> Iterator[Keeper]:
    """Keep what the run sees; if it is to be recorded, also what the store says, where it can be asked."""
    what = f"scenario {played.scenario.name}"
    if recorded and isinstance(stage, LocalStage):
        with Recorder.of(stage.cluster, what=what, seed=played.seed, replay=played.replay) as recorder:
            yield recorder
        return
    now, status = time.time(), stage.client.status()
    header = Header(
        what=what, seed=played.seed, replay=played.replay, cluster=status["cluster"],
        started=now, wall=now - time.monotonic(), ranks=status["desired"],
    )  # fmt: skip
    notebook = Notebook(header)
    yield notebook
    notebook.happened(played.events)
