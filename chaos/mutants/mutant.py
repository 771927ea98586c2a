"""What a mutant is."""

from __future__ import annotations

import msgspec

SIMULATE = "simulate"


class Shown(msgspec.Struct, frozen=True):
    """A simulated run that has shown a mutant once, as `elastic-chaos replay` takes it. `keep` None: all its events."""

    seed: int
    keep: tuple[int, ...] | None = None
    timing: int = 0
    hosts: int = 0
    gpus: bool = False


class Mutant(msgspec.Struct, frozen=True, kw_only=True):
    """The product without one guard: `before`, which `file` contains exactly once, is replaced by `after`."""

    name: str
    guards: str  # the promise, and what the guard does
    file: str
    before: str
    after: str = ""
    tests: tuple[str, ...] = ()  # ids of the tests that must fail; empty: simulated runs must find a violation
    shown: Shown | None = None  # tried first, only to be quick
    hosts: int = 0  # of the simulated runs that must find it; 0: all is on one
    gpus: bool = False  # whether ranks have some in those

    @property
    def caught_by(self) -> str:
        """What must notice it, as the receipt says it."""
        return " ".join(self.tests) or SIMULATE
