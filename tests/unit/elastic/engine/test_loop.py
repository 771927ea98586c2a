"""The engine's loop: what it looks at before it starts a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic.engine.loop import Engine, Peers
from membership.base.errors import Fenced
from membership.store.records import ClusterState
from tests.support.rank_model import TOKEN, config

pytestmark = pytest.mark.unit


def engine_in(state: ClusterState) -> Engine:
    """An engine without requests, whose status writer has noticed nothing."""
    server = SimpleNamespace(take=list, send=lambda _: pytest.fail("it goes on"))
    mirror, status = SimpleNamespace(state=lambda: state), SimpleNamespace(fenced=False)
    fleet = SimpleNamespace(awaited=frozenset())
    peers: Any = SimpleNamespace(mirror=mirror, fleet=fleet, server=server, status=status, events=None)
    return Engine(config(), TOKEN, cast(Peers, peers))


@pytest.mark.parametrize(("token", "by"), [(TOKEN + 1, str(TOKEN + 1)), (0, "none yet")])
def test_an_engine_that_sees_another_token_in_the_store_starts_no_step(token: int, by: str) -> None:
    with pytest.raises(Fenced, match=f"engine {TOKEN} has been replaced by {by}"):
        engine_in(ClusterState(revision=9, engine_token=token)).turn()
