"""A response's requests: none stays open when not all can be submitted; an engine that hangs shows in the probes."""

from __future__ import annotations

import asyncio

import pytest

from elastic.gateway.engine_link import EngineLink, LinkSettings
from elastic.gateway.health import obstacles
from elastic.gateway.journal import Request
from membership.base.errors import JournalError
from membership.base.timing import STUCK_S
from membership.store.records import ClusterState
from workers.protocol.messages import Sampling

pytestmark = pytest.mark.unit


def request(name: str) -> Request:
    return Request(id=name, prompt=[1], sampling=Sampling(), max_tokens=1)


def test_nothing_stays_open_when_a_response_cannot_begin() -> None:
    link = EngineLink("g")
    with pytest.raises(JournalError, match="open already"), link.generation([request("a"), request("a")]):
        pytest.fail("entered")
    assert len(link.journal) == 0


def test_an_engine_that_answers_pings_and_nothing_else_shows_in_the_probes() -> None:
    now = [0.0]
    link = EngineLink("g", clock=lambda: now[0])
    link.ready = True

    def stuck() -> bool:
        return any("no request any further" in reason for reason in obstacles(ClusterState(revision=1), link, False))

    now[0] = 10 * STUCK_S
    assert not stuck()  # no request is open
    with link.generation([request("a")]):
        assert not stuck()
        now[0] += STUCK_S + 1
        with link.generation([request("b")]):  # a new request does not make it look alive
            assert stuck()
    assert not stuck()


def test_time_in_which_the_gateway_itself_was_late_is_no_silence_of_the_engine() -> None:
    """Thousands of connections at once kept its loop busy for ten seconds, and it connected anew for nothing."""
    now, asked = [0.0], [0]

    def hello() -> None:
        asked[0] += 1
        now[0] += 9.0

    link = EngineLink("g", LinkSettings(ping_every_s=0.001, silence_s=0.0105), clock=lambda: now[0])
    link._hello = hello  # type: ignore[method-assign]
    asyncio.run(link._ping())
    assert asked == [11]
