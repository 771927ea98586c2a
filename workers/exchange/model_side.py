"""What the model gives an exchange: the step that runs, and the experts that this rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from membership.store.records import View

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StepContext:
    """Which attempt of which step runs under which view. Every request of the step carries these numbers."""

    view: View
    engine_token: int
    step: int
    attempt: int
    masked: int = 0  # bit r set: rank r must not be used in this step

    @cached_property
    def incarnations(self) -> Mapping[int, int]:
        """Rank -> its incarnation in this view. A process with another incarnation is not a member."""
        return {m.rank: m.incarnation for m in self.view.members}

    def near(self, rank: int) -> frozenset[int]:
        """The ranks of the host that has this one; none if it is no member."""
        hosts = {m.rank: m.node for m in self.view.members}
        return frozenset(other for other, host in hosts.items() if host == hosts.get(rank))


class ExpertBank(Protocol):
    """The experts that a rank holds."""

    def holds(self, layer: int, expert: int) -> bool:
        """Whether `compute_many` may be asked for this expert now."""

    def padded(self, rows: int) -> int:
        """Number of rows that `compute_many` wants for an expert that has `rows`; the added ones may hold anything."""

    def compute_many(self, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor) -> Tensor:
        """[R, H] -> [R, H]: the unweighted outputs of experts whose padded rows follow each other in `rows`.

        The bits of a row depend neither on the other rows nor on the other experts.
        """
