"""A response's requests: none stays open when not all can be submitted; an engine that hangs shows in the probes."""

from __future__ import annotations

import asyncio
from typing import Any, cast
from unittest.mock import Mock

import msgspec
import pytest
from msgspec.structs import replace

from elastic.gateway.engine_link import EngineLink, Generation, LinkSettings, Target
from elastic.gateway.health import obstacles
from elastic.gateway.journal import Delta, Request
from elastic.protocol import Outputs, Rejected, Tokens, Welcome
from membership.base.errors import JournalError, RequestError
from membership.base.timing import STUCK_S
from membership.store.records import ClusterState
from tests.support.rank_model import config
from workers.protocol.messages import Sampling

pytestmark = pytest.mark.unit


def request(name: str) -> Request:
    return Request(id=name, prompt=[1], sampling=Sampling(), max_tokens=1)


def test_nothing_stays_open_when_a_response_cannot_begin() -> None:
    link = EngineLink("g")
    with pytest.raises(JournalError, match="open already"), link.generation([request("a"), request("a")]):
        pytest.fail("entered")
    assert len(link.journal) == 0


def test_only_messages_of_the_engine_that_was_connected_to_count() -> None:
    """An engine that had the office under another token may not attach it, refuse a request, or pass for alive."""
    now = [0.0]
    link, target = EngineLink("g", clock=lambda: now[0]), Target(7, cast(Any, None))
    link._socket = cast(Any, Mock())
    now[0] = 1.0
    link._receive(Welcome(6), target)
    assert (link.ready, link._last_message_at) == (False, 0.0)
    link._receive(Welcome(7), target)
    assert (link.ready, link._last_message_at) == (True, 1.0)
    with link.generation([request("a")]) as generation:
        now[0] = 2.0
        for late in (Tokens(6, "a", 0, [5]), Outputs(6, [Tokens(6, "a", 0, [5])]), Rejected(6, "a", 503, "full")):
            link._receive(late, target)
        assert (list(generation._inbox), link._last_message_at) == ([], 1.0)


def test_outputs_that_come_together_reach_each_its_own_response() -> None:
    link = EngineLink("g")
    link._attach(7)
    with link.generation([request("a")]) as first, link.generation([request("b"), request("c")]) as second:
        link._handle(Outputs(7, [Tokens(7, "b", 0, [4]), Rejected(7, "c", 503, "full"), Tokens(7, "a", 0, [5])]))
        assert list(first._inbox) == [("a", Delta((5,), finish_reason="length"))]
        (_, token), (_, refused) = second._inbox
        assert (token, str(refused)) == (Delta((4,), finish_reason="length"), "full")


def test_a_response_that_nobody_continues_ends_with_an_error() -> None:
    """One timer watches all its waits: it counts from the last one's beginning, and not before."""

    async def asked() -> None:
        loop = asyncio.get_running_loop()
        with Generation(EngineLink("g"), [request("a")], 60.0) as generation:
            deltas = generation.deltas()
            waiting = asyncio.ensure_future(anext(deltas))
            await asyncio.sleep(0)
            generation._waits_since = loop.time() - 59.0
            generation._watch(loop)
            assert generation._wake is not None
            assert not generation._wake.done()
            generation._waits_since = loop.time() - 61.0
            generation._watch(loop)
            with pytest.raises(RequestError, match="no news of the request for 60 s"):
                await waiting
            assert generation._watcher is not None
            assert generation._watcher.cancelled()

    asyncio.run(asked())


def test_a_taker_gets_what_the_reader_waits_for_and_the_reader_the_rest_in_order() -> None:
    """Tokens come while the taker is free, busy, and free again: it must not overtake what waits for the reader."""

    async def asked() -> None:
        link, taken, free = EngineLink("g"), list[int](), [True]
        link._attach(7)
        with link.generation([msgspec.structs.replace(request("a"), max_tokens=9)]) as generation:

            def taker(position: int, delta: Delta) -> bool:
                taken.extend(delta.tokens if free[0] else ())
                return free[0]

            generation.taker = taker
            deltas = generation.deltas()
            link._handle(Tokens(7, "a", 0, [0]))
            assert await anext(deltas) == (0, Delta((0,)))  # it was there before the reader waited
            waiting = asyncio.ensure_future(anext(deltas))
            await asyncio.sleep(0)
            link._handle(Tokens(7, "a", 1, [1]))
            free[0] = False
            link._handle(Tokens(7, "a", 2, [2]))
            free[0] = True
            link._handle(Tokens(7, "a", 3, [3]))
            assert taken == [1]
            assert await waiting == (0, Delta((2,)))
            assert await anext(deltas) == (0, Delta((3,)))
            waiting = asyncio.ensure_future(anext(deltas))
            await asyncio.sleep(0)
            link._handle(Tokens(7, "a", 4, [4]))
            link._handle(Tokens(7, "a", 5, [5], finish_reason="stop"))  # an end is the reader's
            assert taken == [1, 4]
            assert await waiting == (0, Delta((5,), finish_reason="stop"))
            with pytest.raises(StopAsyncIteration):
                await anext(deltas)

    asyncio.run(asked())


@pytest.mark.parametrize("stops", [False, True])
def test_what_a_taker_raises_ends_its_own_response_only(stops: bool) -> None:
    """Also after it stopped the last request, with which the reader would end as if all were well."""

    async def asked() -> None:
        link = EngineLink("g")
        link._attach(7)
        with link.generation([msgspec.structs.replace(request("a"), max_tokens=9)]) as generation:

            def taker(position: int, delta: Delta) -> bool:
                if stops:
                    generation.stop(position)
                raise ValueError("a bug")

            generation.taker = taker
            waiting = asyncio.ensure_future(anext(generation.deltas()))
            await asyncio.sleep(0)
            link._handle(Tokens(7, "a", 0, [1]))
            with pytest.raises(ValueError, match="a bug"):
                await waiting

    asyncio.run(asked())


def test_a_reader_ends_when_its_taker_stops_the_last_request() -> None:
    async def asked() -> None:
        link = EngineLink("g")
        link._attach(7)
        with link.generation([msgspec.structs.replace(request("a"), max_tokens=9)]) as generation:

            def taker(position: int, delta: Delta) -> bool:
                generation.stop(position)
                return True

            generation.taker = taker
            waiting = asyncio.ensure_future(anext(generation.deltas(), None))
            await asyncio.sleep(0)
            link._handle(Tokens(7, "a", 0, [1]))
            async with asyncio.timeout(10):
                assert await waiting is None
        assert not len(link.journal)

    asyncio.run(asked())


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


def test_a_request_that_waits_for_a_place_has_not_stalled() -> None:
    """The engine refuses what has waited for too long. From the first token on it may not fall silent."""
    now = [0.0]
    link = EngineLink("g", LinkSettings(stall_s=10.0), clock=lambda: now[0])
    link.on_state(ClusterState(revision=1, config=config(max_wait_s=500.0)))
    link._attach(7)
    with link.generation([replace(request("waits"), max_tokens=9), replace(request("runs"), max_tokens=9)]):
        link._handle(Tokens(7, "runs", 0, [4]))
        for at, left in ((9.0, ["waits", "runs"]), (11.0, ["waits"]), (509.0, ["waits"]), (511.0, [])):
            now[0] = at
            link.expire(at)
            assert [each.id for each in link.journal.open_requests()] == left
