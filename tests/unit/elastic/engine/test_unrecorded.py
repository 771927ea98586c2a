"""Members without a record, which a new engine would wait for: what does not listen any more is given up at once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import msgspec
import pytest

from elastic.engine.unrecorded import Unrecorded
from membership.base.rank_id import RankId
from membership.base.sockets import accepts
from membership.store.records import ClusterState, Member, RankRecord, RankState, View
from tests.support.helpers import eventually
from workers.protocol.exchange_handle import AutoHandle, TcpHandle

pytestmark = pytest.mark.unit

HERE, THERE = "boot/1", "boot/2"
NEAR, FAR, ALSO_FAR = RankId(0, 1), RankId(1, 2), RankId(2, 3)
MEMBERS = frozenset({NEAR, FAR, ALSO_FAR})
WAIT_S = 30.0


def record(rank: RankId, host: str) -> RankRecord:
    tcp = msgspec.msgpack.encode(TcpHandle(f"tcp://10.0.0.2:{rank.incarnation}", b"key"))
    handle = msgspec.msgpack.encode(AutoHandle(host, b"shm", tcp))
    return RankRecord(
        rank=rank.rank, incarnation=rank.incarnation, node="n", pid=1, state=RankState.STANDBY, exchange_handle=handle
    )


def state(**ranks: str) -> ClusterState:
    """Three members; those that are named have a record, and are on this host."""
    members = tuple(Member(rank=each.rank, incarnation=each.incarnation, node="n") for each in sorted(MEMBERS))
    hosts = {"near": NEAR, "far": FAR, "also_far": ALSO_FAR}
    records = {hosts[name]: record(hosts[name], host) for name, host in ranks.items()}
    return ClusterState(revision=1, view=View(epoch=1, members=members), ranks=records)


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def make(asked: list[str]) -> Iterator[Callable[[bool], Unrecorded]]:
    made: list[Unrecorded] = []

    def one(listens: bool) -> Unrecorded:
        made.append(Unrecorded(lambda endpoint: asked.append(endpoint) or listens, HERE))
        return made[-1]

    yield one
    for each in made:
        each.close()


def test_what_does_not_listen_any_more_is_known_soon_and_told(
    make: Callable[[bool], Unrecorded], asked: list[str]
) -> None:
    known, told = make(False), threading.Event()
    known.on_change = told.set
    known.note(state(near=HERE, far=THERE, also_far=THERE))
    known.note(state())  # their leases have run out
    known.gone(MEMBERS)
    assert told.wait(WAIT_S)
    eventually(lambda: known.gone(MEMBERS) == {FAR, ALSO_FAR}, WAIT_S, "both of the other host")
    assert sorted(asked) == ["tcp://10.0.0.2:2", "tcp://10.0.0.2:3"], "each once, and none of this host"
    assert known.gone({FAR}) == {FAR}


def test_what_listens_is_waited_for(make: Callable[[bool], Unrecorded], asked: list[str]) -> None:
    known = make(True)
    known.note(state(far=THERE))
    known.note(state())
    assert known.gone(MEMBERS) == frozenset()
    eventually(lambda: asked, WAIT_S, "the question")
    known.close()
    assert known.gone(MEMBERS) == frozenset()


def test_of_ranks_that_were_never_seen_nothing_is_known(make: Callable[[bool], Unrecorded], asked: list[str]) -> None:
    known = make(False)
    known.note(state())
    assert known.gone(MEMBERS) == frozenset()
    left = msgspec.structs.replace(state(), view=View(epoch=2))
    known.note(state(far=THERE))
    known.note(left)
    known.note(state())
    assert (known.gone(MEMBERS), asked) == (frozenset(), []), "it is no member any more"


def test_a_port_accepts_or_does_not() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert accepts(endpoint, WAIT_S)
    assert not accepts(endpoint, WAIT_S)


def test_those_that_no_thread_could_ask_are_asked_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[bool], Unrecorded]
) -> None:
    """The engine goes on meanwhile."""
    unrecorded = make(False)
    unrecorded.note(state(far=THERE))

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", no_thread)
        assert unrecorded.gone({FAR}) == frozenset()
    eventually(lambda: unrecorded.gone({FAR}), WAIT_S, "the answer")
    assert unrecorded.gone({FAR}) == {FAR}
