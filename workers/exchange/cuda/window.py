"""What a rank's peers write into: the layout of a window, the GPU memory of one slot.

Each word has one writer, the rank whose number is in its index, so what a dead rank's kernels still write lies where
no live rank looks. A window belongs to a slot and not to a process: whichever incarnation is in the slot maps it.
A rank's rows lie there without gaps, by place, so it has room for as many as the rank can ask about in all and not for
so many at each place: rows of a long piece of a prompt fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from membership.base.errors import ConfigError

MOST_RANKS = 8  # with windows in one another's reach
BANKS = 2  # a rank may be one call ahead of a peer that it sends no rows to
ALIGNMENT = 256
WORD_BYTES = 8
CHUNK_BYTES = 16  # what a thread copies at a time
MOST_ROWS = 8192  # a block keeps a number of each in its 48 KiB of shared memory


@dataclass(frozen=True)
class WindowShape:
    """Equal on all ranks of a host. `held`: experts that a rank can hold per layer; `rows`: of one step of a rank."""

    ranks: int
    held: int
    rows: int
    hidden: int
    top_k: int
    element_bytes: int = 2  # bf16, the only type that `combine` sums

    def __post_init__(self) -> None:
        """ConfigError if the kernels are not made for it."""
        if not 1 <= self.ranks <= MOST_RANKS or not 1 <= self.rows <= MOST_ROWS or self.row_bytes % CHUNK_BYTES:
            raise ConfigError(f"no exchange on GPUs for {self.ranks} ranks, {self.rows} rows of {self.row_bytes} bytes")

    @property
    def row_bytes(self) -> int:
        """Of one token's hidden state."""
        return self.hidden * self.element_bytes

    @property
    def room(self) -> int:
        """Rows that a rank may be asked to compute in one call, or be answered: of all ranks, all for one."""
        return self.ranks * self.rows * self.top_k

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each part begins, and under "bytes" the size of the whole."""
        words = self.ranks * self.held * WORD_BYTES
        rows = self.room * self.row_bytes
        found, at = {}, 0
        parts = {"asked": BANKS * words, "answered": words, "questions": BANKS * rows, "answers": rows}
        for name, size in parts.items():
            found[name] = at
            at += -(-size // ALIGNMENT) * ALIGNMENT
        return found | {"bytes": at}

    def definitions(self) -> dict[str, int]:
        """What the kernels are compiled with."""
        sizes = {"RANKS": self.ranks, "HELD": self.held, "ROWS": self.rows, "TOP_K": self.top_k, "ROOM": self.room}
        offsets = {f"{name.upper()}_AT": at for name, at in self.offsets.items() if name != "bytes"}
        return {**sizes, "CHUNKS": self.row_bytes // CHUNK_BYTES, **offsets}
