"""A rank on another host, as engine and rank see each other: both sides as shipped, over TCP. Only the host differs."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from unittest.mock import Mock

import msgspec
import pytest

from membership.base.enums import DetectedBy
from membership.base.errors import ConfigError, QueueError, WaitTimeout
from membership.base.network import Network, Ports
from membership.base.rank_id import RankId
from membership.store.records import AgentRecord, ClusterState, RankRecord, RankState
from tests.support.helpers import eventually
from tests.support.world import CONFIG
from workers.agent import death_notices
from workers.agent.death_notices import DeathNotices
from workers.fleet import notices
from workers.fleet.fleet import Fleet, FleetEvent, RankJoined, RankLost
from workers.ipc.doorbell import Doorbell
from workers.protocol.live_mask import LiveMask
from workers.protocol.messages import RankMessage, SeqChunk, StepBatch, StepResult, StepStatus, reader_id
from workers.queue.handle import Handle, Remote
from workers.queue.message_queue import MessageQueue, MsgpackCodec
from workers.queue.network import join_key, remote_of
from workers.queue.remote_writer import CrossHostWriter
from workers.queue.silence import Connection
from workers.rank.engine_port import EnginePort

pytestmark = pytest.mark.integration

TOKEN, KEY, WAIT_S = 7, RankId(3, 12), 30.0
NETWORK = Network("127.0.0.1", "moe", b"a secret of the tests' cluster")


class Worker:
    """What an engine's port asks of a worker."""

    mask: LiveMask | None = None

    def attach_mask(self, handle: bytes) -> None:
        self.mask = LiveMask.attach(handle)

    def masked(self) -> int:
        return self.mask.masked() if self.mask is not None else 0

    def evicted(self) -> bool:
        return False

    def commit_epoch(self, epoch: int) -> None: ...

    def execute_model(self, batch: StepBatch) -> StepResult:
        return StepResult(*KEY, batch.engine_token, batch.epoch, batch.step, batch.attempt, StepStatus.OK)

    def close(self) -> None:
        if self.mask is not None:
            self.mask.close()


def elsewhere(handle: bytes) -> bytes:
    """As a process on another host would get it."""
    return msgspec.structs.replace(Handle.decode(handle), host="another host").encode()


def record_of(answers: bytes) -> RankRecord:
    """The far rank's."""
    return RankRecord(
        rank=KEY.rank, incarnation=KEY.incarnation, node="b", pid=1, state=RankState.STANDBY,
        response_handle=elsewhere(answers), liveness_handle=b"of no use here",
    )  # fmt: skip


class Scene:
    """An engine's fleet and one far rank, whose main thread is the test's."""

    def __init__(self, ends: ExitStack, network: Network = NETWORK) -> None:
        self.fleet = Fleet(network=network)
        ends.callback(self.fleet.close)
        self.fleet.open(TOKEN)
        self.bell = Doorbell()
        ends.callback(self.bell.close)
        self.worker = Worker()
        ends.callback(self.worker.close)
        self.port = EnginePort(KEY, self.worker, self.bell, lambda: None, NETWORK)  # type: ignore[arg-type]
        ends.callback(self.port.close)
        self.seen: list[FleetEvent] = []

    def join(self) -> None:
        answers = self.port.attach(TOKEN, elsewhere(self.fleet.broadcast_handle), self.fleet.mask_handle)
        self.fleet.attach(record_of(answers))
        self.collect(lambda: RankJoined(KEY) in self.seen, serving=True)

    def collect(self, enough: Callable[[], bool], *, serving: bool = False) -> None:
        def look() -> bool:
            self.bell.look()  # as the rank's main thread does, which waits there
            while serving and self.port.pending():
                self.port.serve()
            self.seen += self.fleet.collect(0.01, lambda: False)
            return enough()

        eventually(look, WAIT_S, "what the fleet should see")

    def losses(self) -> list[DetectedBy]:
        return [event.source for event in self.seen if isinstance(event, RankLost) and event.rank_id == KEY]


@pytest.fixture
def scene() -> Iterator[Scene]:
    with ExitStack() as ends:
        made = Scene(ends)
        made.join()
        yield made


def test_neither_joins_who_listens_with_a_retired_secret() -> None:
    """Its host has the secret still, and each of them hears while it runs that it is retired."""
    gone = join_key(NETWORK)
    config = msgspec.structs.replace(CONFIG, join_key="new", join_keys_before=(gone,), join_generation=1)
    with ExitStack() as ends:
        scene = Scene(ends)
        engine = TOKEN, elsewhere(scene.fleet.broadcast_handle), scene.fleet.mask_handle
        with pytest.raises(QueueError, match="a join secret that was replaced"):
            scene.port.attach(*engine, frozenset({gone}))
        answers = scene.port.attach(TOKEN + 1, *engine[1:])
        scene.fleet.note(ClusterState(revision=1, config=config))
        with pytest.raises(QueueError, match="a join secret that was replaced"):
            scene.fleet._join(record_of(answers))


def batch(step: int, *masked: int) -> StepBatch:
    return StepBatch(TOKEN, 1, step, 0, [*masked], {KEY.rank: [SeqChunk(1, 0, [5], [0])]})


def test_a_far_rank_joins_and_answers_its_steps(scene: Scene) -> None:
    scene.fleet.broadcast(batch(1))
    scene.collect(lambda: any(isinstance(e, StepResult) and e.step == 1 for e in scene.seen), serving=True)
    assert scene.losses() == []


def test_a_mask_reaches_a_far_rank_in_the_middle_of_a_step(scene: Scene) -> None:
    """Its main thread takes no message here: it is inside a step, and waits for a peer at its doorbell."""

    def masked() -> int:
        scene.bell.look()
        return scene.worker.masked()

    scene.fleet.broadcast(batch(1))
    scene.fleet.mask(5)
    eventually(lambda: masked() == 1 << 5, WAIT_S, "the mask")
    scene.fleet.mask(70)
    eventually(lambda: masked() == 1 << 5 | 1 << 70, WAIT_S, "the mask to grow")
    scene.fleet.adopt([2])
    scene.fleet.broadcast(batch(2, 2))
    eventually(lambda: masked() == 1 << 2, WAIT_S, "the mask of another epoch")


def test_an_older_engine_changes_no_mask(scene: Scene) -> None:
    scene.port.token = TOKEN + 1  # it follows another engine by now
    scene.fleet.mask(5)
    scene.collect(lambda: scene.port.pending())
    assert scene.worker.masked() == 0


def test_its_agent_tells_of_its_death(scene: Scene) -> None:
    scene.fleet.ended(RankId(KEY.rank, 11))
    scene.fleet.ended(KEY)
    scene.collect(lambda: bool(scene.losses()))
    assert scene.losses() == [DetectedBy.AGENT]
    scene.fleet.ended(KEY)
    assert scene.fleet.collect(0.0, lambda: True) == [], "it is lost once"
    assert reader_id(KEY) not in scene.fleet._steps.readers


def agent_record(notices: bytes) -> AgentRecord:
    return AgentRecord(node="b", pid=1, started=0.0, host="another host", notices=notices)


def heard(scene: Scene, agent: DeathNotices) -> bool:
    """Whether the engine has joined this agent's queue."""
    source = scene.fleet._notices._open.get("b")
    return source is not None and agent._queue is not None and source.handle == elsewhere(agent._handle)


def test_its_agent_tells_of_its_death_past_the_store(scene: Scene) -> None:
    """And of another process of its slot, which is none of ours."""
    with closing(DeathNotices("b")) as agent:
        scene.fleet.meet([agent_record(elsewhere(agent.listen(NETWORK)))])
        scene.collect(lambda: heard(scene, agent))
        agent.tell(RankId(KEY.rank, KEY.incarnation - 1))
        agent.tell(KEY)
        scene.collect(lambda: bool(scene.losses()))
        (lost,) = [event for event in scene.seen if isinstance(event, RankLost)]
        assert (lost.rank_id, lost.source, lost.ended) == (KEY, DetectedBy.AGENT, True), "its host's kernel says so"
        scene.fleet.ended(KEY)
        assert scene.fleet.collect(0.0, lambda: True) == [], "the record comes later"


def test_what_it_had_answered_before_comes_before_its_death(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and notices come over two connections."""
    eventually(lambda: scene.bell.look() or by_data(scene), WAIT_S, "a data connection for its answers")
    scene.fleet.broadcast(batch(1))
    eventually(lambda: scene.bell.look() or scene.port.pending(), WAIT_S, "the step")

    def told() -> list[RankId]:
        while scene.port.pending():
            scene.port.serve()
        return [KEY]

    monkeypatch.setattr(scene.fleet._notices, "take", told)
    seen = scene.fleet.collect(0.0, lambda: True)
    assert [type(event) for event in seen] == [StepResult, RankLost]


def by_data(scene: Scene) -> bool:
    """Whether its answers leave over a data connection, in the thread that gives them."""
    scene.seen += scene.fleet.collect(0.0, lambda: True)
    writer = scene.port._answers._writing if scene.port._answers is not None else None
    assert isinstance(writer, CrossHostWriter)
    return all(peer.data is not None for peer in writer._remote._peers.values())


def test_ranks_are_joined_before_others_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that died is left in a moment, its host's thirty in thirty; a successor is waited for."""
    done: list[str] = []
    with Doorbell() as bell, MessageQueue("steps") as steps, LiveMask.create() as mask:
        fleet = Fleet(parts=(bell, steps, mask))
        monkeypatch.setattr(fleet, "_join", lambda record: done.append("joined") or Mock())
        fleet._closing.append(Mock(**{"resources.close": lambda: done.append("left")}))
        fleet.attach(record_of(steps.export_handle().encode()))
        fleet.join_wanted()
    assert done == ["joined", "left"]


def test_a_rank_that_cannot_be_left_in_time_does_not_end_the_joiner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen at a load of 50 on two cores: the engine ended, since a thread of a dead rank's queue took too long."""
    done: list[str] = []
    with Doorbell() as bell, MessageQueue("steps") as steps, LiveMask.create() as mask:
        fleet = Fleet(parts=(bell, steps, mask))
        fleet._closing.append(Mock(**{"resources.close.side_effect": WaitTimeout("thread queue-remote-reader")}))
        fleet._closing.append(Mock(**{"resources.close": lambda: done.append("left")}))
        fleet.join_wanted()
    assert done == ["left"]


def test_an_agent_that_listens_anew_is_joined_anew(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "RETRY_S", 0.05)
    with closing(DeathNotices("b")) as agent:
        old = agent.listen(NETWORK)
        scene.fleet.meet([agent_record(elsewhere(old))])
        scene.collect(lambda: heard(scene, agent))
        agent._listens_with = b"another secret's"
        new = agent.listen(NETWORK)
        assert new != old
        assert agent.listen(NETWORK) == new
        scene.fleet.meet([agent_record(elsewhere(new))])
        scene.collect(lambda: heard(scene, agent))
        agent.tell(KEY)
        scene.collect(lambda: bool(scene.losses()))


def test_an_agent_that_ends_is_forgotten_and_may_come_back_under_its_name(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "RETRY_S", 0.05)
    with closing(DeathNotices("b")) as first:
        scene.fleet.meet([agent_record(elsewhere(first.listen(NETWORK)))])
        scene.collect(lambda: heard(scene, first))
    scene.collect(lambda: not scene.fleet._notices._open)
    assert scene.losses() == [], "its end says nothing of its ranks"
    with closing(DeathNotices("b")) as second:
        scene.fleet.meet([agent_record(elsewhere(second.listen(NETWORK)))])
        scene.collect(lambda: heard(scene, second))
        second.tell(KEY)
        scene.collect(lambda: bool(scene.losses()))


def test_an_agent_without_a_free_port_tells_nothing_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    with closing(DeathNotices("b", clock=lambda: now)) as agent, monkeypatch.context() as patched:
        patched.setattr(death_notices, "remote_of", _no_port)
        assert agent.listen(NETWORK) == b""
        agent.tell(KEY)
        patched.undo()
        assert agent.listen(NETWORK) == b"", "not at once"
        now += death_notices.LISTEN_AGAIN_S
        assert agent.listen(NETWORK)


def _no_port(network: Network) -> Remote:
    raise ConfigError("no port is free")


def test_an_agent_that_lacks_something_keeps_nothing_of_what_it_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port, or a thread. It tries again for ever, so each descriptor that an attempt left would add up."""
    now = 100.0
    high, low = divmod(os.getpid() % 65_000, 256)  # an address of this process's own
    network = replace(NETWORK, address=f"127.2.{high}.{low}", ports=Ports(7400, 7400))

    def attempt(agent: DeathNotices, network: Network) -> int:
        nonlocal now
        now += death_notices.LISTEN_AGAIN_S
        assert agent.listen(network) == b""
        return len(os.listdir("/proc/self/fd"))

    start = threading.Thread.start

    def no_thread(thread: threading.Thread) -> None:
        if thread.name == "queue-remote-writer":
            raise RuntimeError("can't start new thread")
        start(thread)

    with closing(DeathNotices("b", clock=lambda: now)) as agent:
        with socket.create_server((network.address, network.ports.first)):
            before = attempt(agent, network)  # what a process opens once, it has by now
            assert [attempt(agent, network) for _ in range(3)] == [before] * 3
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            before = attempt(agent, NETWORK)
            assert [attempt(agent, NETWORK) for _ in range(3)] == [before] * 3
        now += death_notices.LISTEN_AGAIN_S
        assert agent.listen(NETWORK)


@pytest.mark.parametrize("lacking", [MemoryError(), OSError(errno.EMFILE, "Too many open files")], ids=type)
def test_a_death_that_cannot_be_told_ends_nobody(lacking: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told in the thread that found it, which has more to do."""
    with closing(DeathNotices("b")) as agent:
        assert agent.listen(NETWORK)
        assert agent._queue is not None
        monkeypatch.setattr(agent._queue, "enqueue", Mock(side_effect=lacking))
        agent.tell(KEY)
        agent._queue.enqueue.assert_called_once()  # type: ignore[attr-defined]


def test_the_end_of_its_connection_is_its_end(scene: Scene) -> None:
    scene.port.leave()
    scene.collect(lambda: bool(scene.losses()))
    assert scene.losses() == [DetectedBy.QUEUE]


def test_the_silence_of_its_host_is_its_end(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """How that is seen: tests/integration/workers/queue/test_silence.py."""
    monkeypatch.setattr(Connection, "silent_s", lambda *_: 0.25)
    scene.collect(lambda: bool(scene.losses()))
    (lost,) = [event for event in scene.seen if isinstance(event, RankLost)]
    assert (lost.source, lost.silent_s, lost.ended) == (DetectedBy.SILENCE, 0.25, False)


def test_a_rank_whose_process_has_ended_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record may stand for a while, or again after a cut. Ranks are joined one after the other."""
    monkeypatch.setattr("workers.fleet.fleet.JOIN_TIMEOUT_S", WAIT_S + 10.0)
    with ExitStack() as ends:
        scene = Scene(ends)
        gone = MessageQueue("gone", MsgpackCodec(RankMessage), remote=remote_of(NETWORK))
        handle = elsewhere(gone.export_handle().encode())
        gone.shutdown()
        scene.fleet.attach(
            RankRecord(rank=2, incarnation=5, node="b", pid=1, state=RankState.STANDBY, response_handle=handle)
        )
        scene.join()


def test_another_secret_keeps_it_out() -> None:
    with ExitStack() as ends:
        stranger = Scene(ends, replace(NETWORK, secret=b"another secret, no less long"))
        with pytest.raises(QueueError, match="another join secret"):
            stranger.port.attach(TOKEN, elsewhere(stranger.fleet.broadcast_handle), stranger.fleet.mask_handle)
