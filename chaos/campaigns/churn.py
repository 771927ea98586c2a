"""The churn: hundreds of planned changes of random size and victims under load, some of them cancelled."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from chaos.campaigns.endurance import Endurance, EnduranceReceipt
from chaos.workload.history import percentile
from chaos.workload.streams import FULL, Load, Workload
from elastic.cli.client import wait_for
from membership.base.errors import OperationConflict
from membership.operations.change import Change, drain, scale, undrain
from membership.store.records import Operation, Phase

CANCELLED = 0.1  # share of the changes
TIMEOUT_S = 120.0


class ChurnReceipt(EnduranceReceipt, frozen=True, kw_only=True):
    """What the churn proved. Times are of whole operations, and of their pauses."""

    changes: int
    kinds: dict[str, int]
    outcomes: dict[str, int]
    took_p50_ms: float
    took_p99_ms: float
    pause_p50_ms: float
    pause_p99_ms: float


@dataclass(kw_only=True)
class Churn(Endurance):
    """Change after change; in the end all that was drained is back, and the size as it was."""

    unit = "changes"

    changes: int
    most: int  # never more ranks than these
    load: Load = FULL
    operations: list[Operation] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)

    @property
    def done(self) -> int:
        """Changes that have ended."""
        return len(self.operations)

    def act(self, workload: Workload) -> None:
        """Random changes, then back to the start."""
        chooser, client = random.Random(self.seed), self.cluster.client()
        while self.done < self.changes:
            desired = client.state().desired
            if desired is None:
                continue
            change = draw(chooser, desired.slots, desired.cordoned, self.most)
            operation = self._make(change, cancel=chooser.random() < CANCELLED)
            if operation.target == self.ranks and operation.phase is Phase.DONE:  # only the same size compares
                self.look(self.changes)
            self.notify(f"{self.done}/{self.changes} {change}: {operation.phase} after {_took_ms(operation):.0f} ms; "
                      f"{len(workload.records())} requests ended")  # fmt: skip
        drained = client.status()["drained"]
        for change in ([scale(1)] if drained else []) + [undrain(slot) for slot in drained] + [scale(self.ranks)]:
            self._make(change, cancel=False)

    def _make(self, change: Change, *, cancel: bool) -> Operation:
        """Make a change, or cancel it at once unless it was too quick; the operation once it has ended."""
        client = self.cluster.client()
        operation = client.propose(change, op_id=None, if_epoch=None, timeout_s=TIMEOUT_S)
        if cancel:
            with suppress(OperationConflict):
                client.cancel(operation.id, "churn")
                self.cancelled.add(operation.id)
        *_, operation = wait_for(client, operation, TIMEOUT_S + 10.0, threading.Event())
        self.operations.append(operation)
        return operation

    def receipt(self) -> ChurnReceipt:
        """Check the finished run. Pure."""
        broken = self.broken()
        for operation in self.operations:
            cancelled = operation.id in self.cancelled
            if operation.phase is not (Phase.ABORTED if cancelled else Phase.DONE):
                was = "cancelled " if cancelled else ""
                broken.append(f"{was}operation {operation.id} ended {operation.phase}: {operation.error}")
        if self.done < self.changes:
            broken.append(f"{self.done} changes instead of {self.changes}")
        done = [operation for operation in self.operations if operation.phase is Phase.DONE]
        took, paused = [_took_ms(operation) for operation in done], [operation.pause_ms for operation in done]
        return ChurnReceipt(
            **self.long_receipt(broken),
            changes=self.done,
            kinds=dict(Counter(operation.kind for operation in self.operations)),
            outcomes=dict(Counter(operation.phase.value for operation in self.operations)),
            took_p50_ms=round(percentile(took, 0.5), 1),
            took_p99_ms=round(percentile(took, 0.99), 1),
            pause_p50_ms=round(percentile(paused, 0.5), 1),
            pause_p99_ms=round(percentile(paused, 0.99), 1),
        )


def draw(chooser: random.Random, slots: Sequence[int], drained: Sequence[int], most: int) -> Change:
    """Any change that is possible now: another size, some ranks drained, or a drained one back. Pure."""
    kinds = ["scale"]
    kinds += ["drain"] if len(slots) > 1 else []
    kinds += ["undrain"] * 2 if drained and len(slots) < most else []
    match chooser.choice(kinds):
        case "drain":
            return drain(*chooser.sample(sorted(slots), chooser.randint(1, min(2, len(slots) - 1))))
        case "undrain":
            return undrain(chooser.choice(sorted(drained)))
    return scale(chooser.choice([size for size in range(1, most + 1) if size != len(slots)]))


def _took_ms(operation: Operation) -> float:
    return 1000 * (operation.finished - operation.started)
