"""The vectorised search for an exchange cycle finds what a plain breadth-first search finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membership.placement.exchange_cycle import Step, shortest_cycle
from membership.placement.plan import plan
from tests.support.helpers import calls_in

pytestmark = pytest.mark.unit

Holds = list[set[int]]


def plain_search(holds: Holds, share: list[float], hosts: list[int], start: int, expert: int) -> tuple[Step, ...]:
    """Rank by rank and expert by expert, as the definition reads."""

    def may_go(row: int, to: int) -> list[int]:
        found = []
        for e in sorted(holds[row] - holds[to], key=lambda e: (share[e], e)):
            before = [host for at, host in enumerate(hosts) if e in holds[at]]
            after = [*before, hosts[to]]
            after.remove(hosts[row])
            if hosts[row] == hosts[to] or len(set(after)) >= min(len(set(before)), 2):
                found.append(e)
        return found

    paths = {row: ((start, row, expert),) for row in range(len(holds)) if hosts[row] != hosts[start]}
    queue = list(paths)
    for row in queue:
        for to in [start, *(r for r in range(len(holds)) if r not in paths and r != start)]:
            handed = [e for e in may_go(row, to) if e not in {taken for _, _, taken in paths[row]}]
            if not handed:
                continue
            path = ((row, to, handed[0]), *paths[row])
            if to == start:
                return path
            paths[to] = path
            queue.append(to)
    return ()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_it_finds_the_same_cycle_as_a_plain_search(data: st.DataObject) -> None:
    experts, rows = data.draw(st.integers(2, 8)), data.draw(st.integers(2, 7))
    hosts = data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    holds = [data.draw(st.sets(st.integers(1, experts - 1))) for _ in range(rows)]
    share = [float(data.draw(st.integers(0, 4))) for _ in range(experts)]
    start = data.draw(st.integers(0, rows - 1))
    holds[start].add(0)  # expert 0 is on this host only
    for row in range(rows):
        if hosts[row] == hosts[start] and data.draw(st.booleans()):
            holds[row].add(0)
    held = np.array([[e in mine for e in range(experts)] for mine in holds])
    on_host = np.array([held[np.array(hosts) == host].sum(axis=0) for host in range(3)])
    last_of_two = (on_host == 1) & (on_host[hosts[start]] > 0) & ((on_host > 0).sum(axis=0) == 2)
    home = (np.array(hosts) == hosts[start])[:, None]
    may_go = home | ~last_of_two[np.array(hosts)]
    found = shortest_cycle(held, np.array(share), np.array(hosts), may_go, (start, 0))
    assert found == plain_search(holds, share, hosts, start, 0)


def test_experts_that_cannot_leave_their_host_are_not_searched_for_one_by_one() -> None:
    """Eight ranks are full on one host, the ninth is alone on another: most experts must stay on a single host."""
    before = dict.fromkeys(range(8), "a")
    after = {**before, 8: "b"}
    current = plan(4, 64, before, 2.0, nodes=before)
    with calls_in() as calls:
        plan(4, 64, after, 2.0, current, nodes=after)
    assert calls.count < 20_000, "a number of calls, not a time"


def test_a_large_host_is_left_by_many_experts_at_little_cost() -> None:
    nodes = {rank: "ab"[rank // 32] for rank in range(64)}
    half = {rank: "a" for rank in range(32)}
    current = plan(2, 64, half, 2.0, nodes=half)
    with calls_in() as calls:
        placement = plan(2, 64, nodes, 2.0, current, nodes=nodes)
    for layer in range(2):
        for expert in range(64):
            assert {nodes[rank] for rank, held in placement.items() if expert in held[layer]} == {"a", "b"}
    assert calls.count < 60_000
