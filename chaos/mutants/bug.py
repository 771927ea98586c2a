"""What a planted bug is."""

from __future__ import annotations

import msgspec

SIMULATE = "simulate"


class Bug(msgspec.Struct, frozen=True, kw_only=True):
    """One guard taken out of the product: `before`, which stands in `file` exactly once, gives way to `after`."""

    name: str
    guards: str  # the promise, and what the guard is
    file: str
    before: str
    after: str = ""
    caught_by: str = SIMULATE  # or the name of a check in `chaos/mutants/checks`
    shown_by: int = 0  # a life in which it showed once, looked at first: only to be quick
