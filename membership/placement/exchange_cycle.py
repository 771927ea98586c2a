"""Exchange cycles: an expert leaves its only failure domain, and full ranks hand experts on in a circle.

No rank's size changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from membership.placement.tally import Bools, Floats, Ints

Step = tuple[int, int, int]
"""(from rank, to rank, expert)."""


def shortest_cycle(
    holds: Bools, share: Floats, domains: Ints, may_go: Bools, first: tuple[int, int]
) -> tuple[Step, ...]:
    """Return the shortest cycle of exchanges that moves an expert from its only domain to another; () if there is none.

    `first`: a rank that holds the expert, and the expert. A rank in another domain takes it and hands an expert on,
    and so on back to the first rank. Each hands on its least loaded expert that the next one lacks, and that may go
    from it to the first rank's domain: `may_go`, `holds` [row, expert]; `domains` [row].
    """
    start, expert = first
    home = domains == domains[start]
    away = np.flatnonzero(~home)
    able_away = holds[away] & may_go[away]
    direct = np.flatnonzero((able_away & ~holds[start]).any(axis=1))
    if direct.size:
        at = int(direct[0])
        handed = _lightest(able_away[at] & ~holds[start], share)
        return ((int(away[at]), start, handed), (start, int(away[at]), expert))
    came = {int(row): (start, expert) for row in away}  # row -> (from, what it takes)
    home[start] = False
    pending = np.flatnonzero(home)
    queue = away[able_away.any(axis=1)].tolist()
    for row in queue:
        path = _path(came, start, row)
        able = holds[row] & may_go[row]
        able[[taken for _, _, taken in path]] = False
        if (back := able & ~holds[start]).any():
            return ((row, start, _lightest(back, share)), *path)
        options = able & ~holds[pending]
        reached = options.any(axis=1)
        for to, option in zip(pending[reached].tolist(), options[reached], strict=True):
            came[to] = (row, _lightest(option, share))
            queue.append(to)
        pending = pending[~reached]
    return ()


def _path(came: Mapping[int, tuple[int, int]], start: int, row: int) -> tuple[Step, ...]:
    """Return the steps from `start` to `row`, the last one first."""
    steps = []
    while row != start:
        before, taken = came[row]
        steps.append((before, row, taken))
        row = before
    return tuple(steps)


def _lightest(which: Bools, share: Floats) -> int:
    return int(np.where(which, share, np.inf).argmin())
