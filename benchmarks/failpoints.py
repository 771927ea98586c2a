"""What a failpoint costs where nobody asked for one: ns per pass, beside a call of an empty function."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable

from membership import failpoints

CALLS = 1_000_000
ROUNDS = 7


def nothing(name: str, rank: int | None = None) -> None:
    """The least that any call costs."""


def ns_per_call(call: Callable[[], None]) -> float:
    """Median of some rounds."""
    return statistics.median(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e9


def main() -> None:
    """Measure and print."""
    empty = ns_per_call(lambda: nothing("rank.prepared", 1))
    off = ns_per_call(lambda: failpoints.hit("rank.prepared", 1))
    print(f"empty call {empty:.0f} ns, failpoint that is off {off:.0f} ns (median of {ROUNDS} x {CALLS} calls)")


if __name__ == "__main__":
    main()
