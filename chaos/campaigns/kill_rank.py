"""The demo's campaign: stream, scale up, kill a rank, wait for the repair, scale back.

The receipt's numbers are measured by the clients (gaps), by the cluster's own event history (detection, recovery,
epochs) or by the injector (when the process was gone).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.campaigns.campaign import SHOWN, Campaign, Receipt
from chaos.faults import Killed, kill
from chaos.target.waiting import until
from chaos.workload.history import percentile
from chaos.workload.streams import FULL, Load, Workload
from membership.base.events import Event
from membership.store.records import Operation

BACK_S = 90.0  # by then the killed rank has a successor


class KillRankReceipt(Receipt, frozen=True, kw_only=True):
    """What the demo proved. -1: it did not happen."""

    detected_ms: float
    recovered_ms: float
    max_token_gap_ms: float
    steady_token_gap_p99_ms: float
    scale_pause_ms: float
    restored_ms: float
    epochs: tuple[int, ...]


@dataclass(kw_only=True)
class KillRank(Campaign):
    """`ranks` -> +2 -> a kill -> `ranks`, and at least `at_least_s` of streaming."""

    load: Load = FULL
    at_least_s: float = 0.0
    scales: list[Operation] = field(default_factory=list)
    victim: int = -1  # the rank that was killed
    killed: Killed | None = None
    restored_at: float = 0.0

    def act(self, workload: Workload) -> None:
        """Scale, kill, scale."""
        began, more = time.monotonic(), self.ranks + 2
        until_tokens(workload, streams=workload.concurrency)
        self.notify(f"scale {self.ranks} -> {more} while they stream")
        self.scales.append(self.cluster.scale(more))
        victim = random.Random(self.seed).choice(self.cluster.wait_serving(more)["ranks"])
        until_tokens(workload, streams=1)
        self.notify(f"kill -9 rank {victim['rank']} (pid {victim['pid']})")
        self.victim, self.killed = victim["rank"], kill(victim["pid"])
        until(lambda: self._replaced(victim, more), f"a new incarnation of rank {self.victim}", BACK_S)
        self.restored_at = time.time()
        self.notify(f"scale {more} -> {self.ranks}")
        self.scales.append(self.cluster.scale(self.ranks))
        self.wait_whole()
        time.sleep(max(0.0, began + self.at_least_s - time.monotonic()))

    def _replaced(self, victim: dict[str, Any], ranks: int) -> bool:
        found = self.cluster.wait_serving(ranks, notify=self.notify)["ranks"]
        return any(r["rank"] == victim["rank"] and r["incarnation"] != victim["incarnation"] for r in found)

    def receipt(self, events: Sequence[Event]) -> KillRankReceipt:
        """Check the finished run. Pure. `events`: the cluster's history."""
        sent_at = self.killed.sent_at if self.killed else 0.0
        steady = [gap for record in self.oracle.values() for gap in record.gaps_ms()]
        committed, epochs = epochs_of(events)
        detected_ms, recovered_ms = (self._since_kill(events, kind) for kind in ("rank_masked", "rank_recovered"))
        broken = [*self.verdict().explained(SHOWN), *self.unproven()]
        if self.killed is None:
            broken.append("no rank was killed")
        if not self.restored_at:
            broken.append("the cluster did not come back to full strength")
        if uneven(committed, epochs):
            broken.append(f"epochs do not rise by exactly 1: {list(epochs)}")
        if min(detected_ms, recovered_ms) < 0:
            broken.append(f"the engine did not notice the death of rank {self.victim}, or did not recover from it")
        return KillRankReceipt(
            **self.outcome(broken),
            detected_ms=detected_ms,
            recovered_ms=recovered_ms,
            max_token_gap_ms=self.max_token_gap_ms(),
            steady_token_gap_p99_ms=round(percentile(steady, 0.99), 1),
            scale_pause_ms=round(max((operation.pause_ms for operation in self.scales), default=0.0), 1),
            restored_ms=round((self.restored_at - sent_at) * 1000.0, 1) if self.restored_at else -1.0,
            epochs=epochs,
        )

    def _since_kill(self, events: Sequence[Event], kind: str) -> float:
        """Milliseconds from the kill to the first such event about the victim; -1 if it never came."""
        if self.killed is None:
            return -1.0
        sent_at = self.killed.sent_at
        found = (e.ts for e in events if e.kind == kind and e.rank == self.victim and e.ts >= sent_at)
        return next((round((ts - sent_at) * 1000.0, 2) for ts in found), -1.0)


def epochs_of(events: Sequence[Event]) -> tuple[list[int], tuple[int, ...]]:
    """Epochs in the order of their commits, and all that are proven to have been committed.

    A controller that dies between its commit and its event reports nothing: then the engine's event is the proof.
    """
    committed = [event.epoch for event in events if event.kind == "epoch_committed"]
    return committed, tuple(sorted({*committed, *(each.epoch for each in events if each.kind == "epoch_adopted")}))


def uneven(committed: list[int], epochs: tuple[int, ...]) -> bool:
    """Whether epochs do not rise by exactly 1, or there are none."""
    rising = committed == sorted(set(committed))
    return not committed or not rising or epochs != tuple(range(epochs[0], epochs[0] + len(epochs)))


def until_tokens(workload: Workload, streams: int) -> None:
    """Wait until that many streams have tokens and are in the middle of a request."""
    until(
        lambda: sum(count > 0 for count in workload.open_streams().values()) >= streams,
        lambda: f"{streams} streams under way: {workload.open_streams()}",
    )
