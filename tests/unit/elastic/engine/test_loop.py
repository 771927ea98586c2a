"""The engine's loop: what it looks at before it starts a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic.engine.loop import Engine, Peers
from membership.base.errors import Fenced
from membership.store.records import ClusterState
from tests.support.rank_model import TOKEN, config, view
from workers.protocol.messages import StepResult, StepStatus

pytestmark = pytest.mark.unit


def engine_in(state: ClusterState, events: object = None) -> Engine:
    """An engine without requests, whose status writer has noticed nothing."""
    server = SimpleNamespace(take=list, send=lambda _: pytest.fail("it goes on"))
    mirror, status = SimpleNamespace(state=lambda: state), SimpleNamespace(fenced=False)
    fleet = SimpleNamespace(awaited=frozenset())
    peers: Any = SimpleNamespace(mirror=mirror, fleet=fleet, server=server, status=status, events=events)
    return Engine(config(), TOKEN, cast(Peers, peers))


@pytest.mark.parametrize(("token", "by"), [(TOKEN + 1, str(TOKEN + 1)), (0, "none yet")])
def test_an_engine_that_sees_another_token_in_the_store_starts_no_step(token: int, by: str) -> None:
    with pytest.raises(Fenced, match=f"engine {TOKEN} has been replaced by {by}"):
        engine_in(ClusterState(revision=9, engine_token=token)).turn()


def test_a_link_that_is_cut_and_that_is_back_is_reported_with_the_peer() -> None:
    seen: list[tuple[str, int, int, str]] = []

    def emit(kind: str, *, rank: int, peer: int, peer_node: str, **_: object) -> None:
        seen.append((kind, rank, peer, peer_node))

    engine, used = engine_in(ClusterState(revision=1), SimpleNamespace(emit=emit)), view(1, {0: 1, 1: 2})
    engine._scheduler.set_view(used, (), 0.0)
    for unlinked in ([1], [1], [1], []):
        engine._handle([StepResult(0, 1, TOKEN, 1, 5, 0, StepStatus.OK, unlinked=unlinked)])
    node = used.members[1].node
    assert node
    assert seen == [("link_lost", 0, 1, node), ("link_back", 0, 1, node)]
