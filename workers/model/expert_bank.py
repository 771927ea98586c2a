"""The experts that this rank holds.

They come and go one by one while the rank serves: a background thread loads, the step thread computes. Entries are
replaced whole, so no lock is held while computing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

from torch import Tensor
from torch.nn import functional

from membership.base.errors import ModelError
from workers.model.backend import ExpertProducts
from workers.model.expert_source import ExpertSource, ExpertWeights
from workers.model.weight_digests import table

_NOT_OPEN = "experts were asked for before the model was loaded"


class LocalExpertBank:
    """Experts by (MoE layer, logical id). Empty and unable to load or compute until `open`."""

    def __init__(self) -> None:
        self._source: ExpertSource | None = None
        self._products: ExpertProducts | None = None
        self._held: dict[tuple[int, int], ExpertWeights] = {}
        self.version = 0  # another one whenever an expert has come or gone
        self.bytes_mapped = 0  # from the host's weight store, in all

    def open(self, source: ExpertSource, products: ExpertProducts) -> None:
        """Say where experts come from, and what multiplies with them."""
        self._source = source
        self._products = products

    def holds(self, layer: int, expert: int) -> bool:
        """Whether `compute` would work."""
        return (layer, expert) in self._held

    def held(self) -> frozenset[tuple[int, int]]:
        """All (layer, expert) here."""
        return frozenset(self._held)

    def digests(self, layers: int, experts: int) -> tuple[bytes, ...]:
        """Of all experts here, by content: one string per MoE layer."""
        held = dict(self._held)  # another thread may load meanwhile
        return table({key: weights.digest for key, weights in held.items()}, layers, experts)

    def padded(self, rows: int) -> int:
        """How many rows `compute_many` wants for an expert that has `rows`; the added ones may hold anything."""
        return self._products.padded(rows) if self._products is not None else rows

    def compute(self, layer: int, expert: int, rows: Tensor) -> Tensor:
        """The unweighted outputs [R, H] of one expert for rows [R, H]. ModelError if it is not here."""
        count = rows.shape[0]
        padded = self.padded(count)
        if padded != count:
            rows = functional.pad(rows, (0, 0, 0, padded - count))
        out = self.compute_many(layer, [expert], [padded], rows)
        return out if padded == count else out[:count]

    def compute_many(self, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor) -> Tensor:
        """Outputs [R, H] of several experts at once: the first `sizes[0]` rows are for `experts[0]`, and so on.

        Each size must be as `padded` gave it. ModelError if an expert is not here.
        """
        if self._products is None:
            raise ModelError(_NOT_OPEN)
        return self._products.compute([self.weights(layer, expert) for expert in experts], sizes, rows)

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """ModelError if it is not here."""
        weights = self._held.get((layer, expert))
        if weights is None:
            raise ModelError(f"expert {expert} of MoE layer {layer} is not on this rank")
        return weights

    def load(self, layer: int, expert: int) -> int:
        """Get an expert if it is not here yet; the bytes read for it. May run in any thread."""
        return self.load_all([(layer, expert)])

    def load_all(
        self,
        wanted: Iterable[tuple[int, int]],
        stop: Callable[[], bool] = lambda: False,
        before_read: Callable[[], object] | None = None,
    ) -> int:
        """Get what is missing of `wanted`, in order, until `stop` says to give up; the bytes read from the checkpoint.

        What the host's weight store had is not read: it adds to `bytes_mapped`. ModelError before `open`, and if an
        expert cannot be read.
        """
        missing = [key for key in dict.fromkeys(wanted) if key not in self._held]
        read = 0
        if not missing:
            return read
        if self._source is None or self._products is None:
            raise ModelError(_NOT_OPEN)
        if stop():
            return read
        with closing(self._source.load_many(missing, before_read, stop)) as coming:
            for key, weights in coming:
                self._products.calibrate(weights)
                self._held[key] = weights
                self.version += 1
                if weights.mapped:
                    self.bytes_mapped += weights.nbytes
                else:
                    read += weights.nbytes
                if stop():
                    break
        return read

    def drop(self, keep: frozenset[tuple[int, int]]) -> int:
        """Forget every expert that is not in `keep`; how many."""
        gone = [key for key in self._held if key not in keep]
        for key in gone:
            del self._held[key]
            self.version += 1
        if self._source is not None:
            self._source.dropped(gone)
        return len(gone)
