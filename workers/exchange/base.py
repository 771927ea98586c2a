"""What the model asks of an exchange, and what an exchange asks of the model.

An exchange carries rows between a token's owner and the ranks that hold its experts: request and reply per (layer,
rank), no collective, so that ranks may be in different layers, idle, new or dead without anybody else noticing.
Transports differ (shared memory, sockets, RDMA); this contract and the routing in `router.py` do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from membership.store.records import View

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class StepContext:
    """Which attempt of which step runs under which view. Everything exchanged in it carries these numbers."""

    view: View
    engine_token: int
    step: int
    attempt: int
    masked: int = 0  # bit r set: rank r must not be used in this step

    @cached_property
    def incarnations(self) -> Mapping[int, int]:
        """The incarnation that counts in each rank slot; any other is a stranger."""
        return {m.rank: m.incarnation for m in self.view.members}


class ExpertBank(Protocol):
    """The experts that a rank holds."""

    def holds(self, layer: int, expert: int) -> bool:
        """Whether `compute_many` may be asked for this expert now."""

    def padded(self, rows: int) -> int:
        """How many rows `compute_many` wants for an expert that has `rows`; the added ones may hold anything."""

    def compute_many(self, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor) -> Tensor:
        """[R, H] -> [R, H]: the unweighted outputs of experts whose padded rows follow each other in `rows`.

        The bits of a row depend neither on the other rows nor on the other experts.
        """


class Exchange(Protocol):
    """One rank's side. All calls come from the rank's main thread; `connect` and `stir` may come from any."""

    device: torch.device  # where the experts compute
    retried_rows: int  # rows sent again to a replica in this step
    retried_at: float  # when the last of them was answered (time.monotonic); 0: there were none
    suspects: set[int]  # ranks that stopped answering in this step

    def handle(self) -> bytes:
        """Where peers reach this rank."""

    def connect(
        self, peers: Mapping[int, tuple[int, bytes]], timeout_s: float, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Link with each rank -> (incarnation, handle); the newer incarnation dials. Linked ones are left alone.

        Fenced instead of waiting for peers once `given_up()`, which is asked at first and after each `stir`.
        """

    def stir(self) -> None:
        """Have `connect` ask again whether it is given up."""

    def begin_step(self, ctx: StepContext) -> None:
        """Everything until the next call belongs to this attempt."""

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]: the weighted sum of each row's experts. CoverageLost, PeerTimeout."""

    def serve(self) -> int:
        """Answer what peers have asked so far; how many requests that were. Never blocks."""

    def pending(self) -> bool:
        """Whether `serve` has something to do."""

    def outbox(self, rank: int, incarnation: int, nbytes: int) -> memoryview[int]:
        """Host memory that this peer can read, `nbytes` or as much as there is. RankError if it cannot be reached."""

    def inbox(self, rank: int, incarnation: int) -> memoryview[int]:
        """What this peer has put into its outbox for us; it may change if the peer writes again."""

    def disconnect(self, peers: Iterable[tuple[int, int]]) -> None:
        """Drop the links with these (rank, incarnation): nothing that they still write can be seen."""

    def close(self) -> None:
        """Drop all links."""
