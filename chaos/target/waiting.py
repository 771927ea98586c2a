"""What a run waits for in a cluster that is being struck. A wait has a deadline, and outlasts an etcd that is away."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar

from chaos.target.cluster import ServedCluster
from membership.base.errors import StoreUnavailable, WaitTimeout
from membership.store.records import RankRecord

T = TypeVar("T")

POLL_S = 0.01
LIMIT_S = 60.0
WHOLE_S = 120.0


def eventually(ask: Callable[[], T | None], what: str, timeout_s: float = LIMIT_S) -> T:
    """The first answer that says something (is true); WaitTimeout names `what` did not come."""
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(StoreUnavailable):
            answer = ask()
            if answer:
                return answer
        if time.monotonic() > deadline:
            raise WaitTimeout(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(POLL_S)


def serving(cluster: ServedCluster) -> dict[int, RankRecord]:
    """The records of the ranks in the view, once each has one (leases may have run out while etcd was away)."""

    def records() -> dict[int, RankRecord] | None:
        state = cluster.client().state()
        members = state.view.members if state.view is not None else ()
        keys = [member.id for member in members]
        return {key.rank: state.ranks[key] for key in keys} if all(key in state.ranks for key in keys) else None

    return eventually(records, "a record of each rank in the view")


def successor(cluster: ServedCluster, victim: RankRecord, delay_s: float) -> RankRecord:
    """The victim's successor, `delay_s` after it was first seen: handshaking, loading, or just committed."""

    def newer() -> RankRecord | None:
        known = cluster.client().state().ranks.items()
        return next(
            (r for (rank, number), r in known if rank == victim.rank and number > victim.incarnation and r.pid), None
        )

    record = eventually(newer, f"a successor of rank {victim.rank}")
    time.sleep(delay_s)
    return record


def staged(cluster: ServedCluster, victim: RankRecord) -> None:
    """Until a view with the victim's successor is staged, or, if that was too quick to be seen, committed."""

    def there() -> bool:
        state = cluster.client().state()
        members = [view.member(victim.rank) for view in (state.next, state.view) if view is not None]
        return any(member is not None and member.incarnation > victim.incarnation for member in members)

    eventually(there, f"a view with a successor of rank {victim.rank}")


def given_up(cluster: ServedCluster, victim: RankRecord) -> None:
    """Until this incarnation is masked, or out of the view."""

    def gone() -> bool:
        state = cluster.client().state()
        member = state.view.member(victim.rank) if state.view is not None else None
        if member is None or member.incarnation != victim.incarnation:
            return True
        return state.engine_status is not None and victim.rank in state.engine_status.masked

    eventually(gone, f"rank {victim.rank} to be given up")


def whole(cluster: ServedCluster, ranks: int, dead: Mapping[int, int], timeout_s: float = WHOLE_S) -> None:
    """Until all slots serve, those of `dead` (rank -> incarnation) with a later incarnation."""

    def again() -> bool:
        status = cluster.wait_serving(ranks, timeout_s=timeout_s)
        return all(each["incarnation"] > dead.get(each["rank"], -1) for each in status["ranks"])

    eventually(again, f"{ranks} ranks to serve, with others for {sorted(dead)}", timeout_s)
