"""Which steps all ranks run together over their GPUs' windows (`--gpu-exchange`), and when one of them is called off.

It may have pieces of prompts: windows have room for as many rows as a rank has in any step (`max_batched_tokens`).
Windows are one agent's, so all live ranks must be its. They wait for each other's kernels, also for those of ranks
without requests. So all of them are named in such a step, and once one is lost or does not finish, it is called off for
all: the word that their kernels look at is set beyond its numbers. Its chunks are in the next step again. Pure: the
loop carries out what is decided here.
"""

from __future__ import annotations

from collections.abc import Set

import msgspec

from membership.base.rank_id import RankId
from membership.store.records import ClusterConfig, View
from workers.protocol.liveness import NUMBERS_PER_S
from workers.protocol.messages import StepBatch, StepResult, StepStatus


class GpuSteps:
    """Of one engine's term."""

    def __init__(self, config: ClusterConfig) -> None:
        self._slots, self._layers, self._experts = config.gpu_exchange, config.moe_layers, config.experts
        self._below = 1  # all numbers used so far are smaller
        self._running = False
        self._apart = 0  # the last epoch in which a rank could not
        self._epoch = self._used = 0  # of the step under way; of the last one that went well
        self._travels: tuple[int, frozenset[int], bool] = (0, frozenset(), False)  # what was found for whom

    def plan(self, batch: StepBatch, view: View, near: Set[RankId], now: float) -> StepBatch:
        """The batch as it is to be run: with all live ranks and a number, if they run it together.

        Numbers are microseconds of the host's clock, so that those of the next engine are larger than all of ours.
        """
        live = frozenset(view.ranks) - set(batch.masked)
        self._running = self._able(view, live, near)
        if not self._running:
            return batch
        self._epoch = view.epoch
        first = max(self._below, int(now * NUMBERS_PER_S))
        self._below = first + self._layers
        named = {rank: batch.ranks.get(rank, []) for rank in sorted(live)}
        return msgspec.structs.replace(batch, ranks=named, together=first)

    def _able(self, view: View, live: frozenset[int], near: Set[RankId]) -> bool:
        return (
            self._apart != view.epoch
            and len(live) > 1
            and max(live) < self._slots
            and all(member.id in near for member in view.members if member.rank in live)
            and len({member.node for member in view.members if member.rank in live}) == 1
            and self._rows_travel(view, live)
        )

    def _rows_travel(self, view: View, live: frozenset[int]) -> bool:
        """Whether some live rank lacks an expert; where all have all, each runs on its own."""
        if self._travels[:2] != (view.epoch, live):
            held = [len(set(layer)) for rank in live for layer in view.placement.get(rank, ())]
            whole = len(held) == len(live) * self._layers and min(held) == self._experts
            self._travels = view.epoch, live, not whole
        return self._travels[2]

    def ended(self) -> bool:
        """All have answered. Whether this was the first such step of its view that went well."""
        used = self._used
        if self._running:
            self._running, self._used = False, self._epoch
        return self._used != used

    def failed(self) -> int:
        """A rank has not finished the step under way: the number below which all is called off now; 0: nothing is."""
        running, self._running = self._running, False
        return self._below if running else 0

    def answered(self, result: StepResult) -> int:
        """As `failed`, if this answer says so.

        Where a rank cannot take part, or gives up before we have called the step off, its view has no more such steps.
        """
        if result.status is StepStatus.OK:
            return 0
        if result.status is StepStatus.APART or (result.status is StepStatus.CALLED_OFF and self._running):
            self._apart = result.epoch
        return self.failed()
