"""How far other hosts' clocks are from ours, by the time of day in their agents' heartbeats: for `elastic doctor`.

A heartbeat is seen later than it was dated, by what its write and its notification take. So a clock may be further
ahead than it looks, by that much. Of several heartbeats the one that came soonest counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

from elastic.serve.model_check import Finding
from membership.base.timing import CLOCK_SKEW_S
from membership.store.codec import decode
from membership.store.interface import Store
from membership.store.keys import Keys
from membership.store.records import Heartbeats

BEATS = 2  # of each host
WAIT_S = 5.0  # for them; an agent publishes one per second
HINT = "have both hosts set their clocks (chronyd, systemd-timesyncd): times in status and backoffs are compared"


class Offset(NamedTuple):
    """A host's clock beside ours."""

    ahead_s: float
    within_s: float  # how far from the truth this may be: our round trip to etcd, and what heartbeats differed by


def offsets(
    store: Store,
    keys: Keys,
    nodes: Collection[str],
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    wait_s: float = WAIT_S,
) -> dict[str, Offset]:
    """Of those nodes whose agents publish a heartbeat in time."""
    begun = clock()
    revision, _ = store.range(keys.all_heartbeats)
    round_trip_s, deadline = clock() - begun, begun + wait_s
    seen: dict[str, list[float]] = {node: [] for node in nodes}
    with closing(store.watch(keys.all_heartbeats, revision + 1)) as watch:
        while any(len(found) < BEATS for found in seen.values()) and (left_s := deadline - clock()) > 0:
            batch, now = watch.next(left_s), wall()
            for event in batch.events if batch is not None else ():
                if event.kind == "put" and (beat := decode(event.kv.value, Heartbeats)).node in seen:
                    seen[beat.node].append(beat.at - now)
    return {
        node: Offset(max(found), round_trip_s + max(found) - min(found)) for node, found in seen.items() if found
    }  # fmt: skip


def clock_findings(nodes: Collection[str], found: Mapping[str, Offset]) -> Iterator[Finding]:
    """One per node."""
    for node in sorted(nodes):
        offset = found.get(node)
        if offset is None:
            hint = "`elastic status` says whether it lives; `elastic agent` there logs why etcd is not reached"
            message = f"its clock is unknown: its agent has published nothing for {WAIT_S:g} s"
            yield Finding(f"host {node}", "warn", message, hint)
            continue
        side = "ahead of" if offset.ahead_s > 0 else "behind"
        message = f"its clock is {abs(offset.ahead_s):.3f} s {side} this host's, give or take {offset.within_s:.3f} s"
        wrong = abs(offset.ahead_s) - offset.within_s > CLOCK_SKEW_S
        yield Finding(f"host {node}", "warn" if wrong else "ok", message, HINT if wrong else "")
