"""When agents of other hosts are joined: never so that a rank would have to wait for it for long."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from membership.base.errors import WaitTimeout
from membership.base.network import Network
from membership.base.rank_id import RankId
from workers.fleet import notices
from workers.fleet.notices import RETRY_MAX_S, RETRY_S, Notices
from workers.protocol.death_notice import DeathNotice
from workers.queue.handle import Handle
from workers.queue.message_queue import MessageQueue

pytestmark = pytest.mark.unit

NETWORK = Network("127.0.0.1", "moe", b"a secret of the tests' cluster")


class Scene:
    """Agents that answer or do not, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.wakes = 100.0, 0
        self.asked: list[str] = []
        self.silent = {"a", "b", "c"}
        self.doorbell = Mock()
        self.notices = Notices(self.doorbell, lambda: self.now, self._woken)
        self.warned = Mock()
        monkeypatch.setattr(MessageQueue, "create_from_handle", self._created)
        monkeypatch.setattr(notices, "keys_for", lambda *_: None)
        monkeypatch.setattr(notices, "log", Mock(warning=self.warned))

    def _woken(self) -> None:
        self.wakes += 1

    def _created(self, handle: Handle, *_: object) -> Mock:
        self.asked.append(handle.queue)
        if handle.queue in self.silent:
            raise WaitTimeout("it did not answer")
        return Mock(**{"pending.return_value": False, "try_dequeue.return_value": None})

    def join(self) -> list[str]:
        """One turn of the thread that joins: whom it asks."""
        self.asked.clear()
        self.notices.join("engine-7", NETWORK)
        return self.asked.copy()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(monkeypatch)
    made.notices.meet({node: handle(node) for node in "abc"})
    yield made
    made.notices.close()


def handle(node: str) -> bytes:
    return Handle(node, "msgpack", "another host", "").encode()


def test_one_agent_is_joined_in_a_turn_and_ranks_come_between(scene: Scene) -> None:
    before = scene.wakes
    assert [scene.join() for _ in range(4)] == [["a"], ["b"], ["c"], []]
    assert scene.wakes - before == 2, "it has more to do after the first two turns"


def test_agents_that_report_nothing_are_looked_at_together(scene: Scene) -> None:
    """The engine does so for each batch of answers, and a read of a socket each would add up over many hosts."""
    scene.silent = set()
    for _ in range(3):
        scene.join()
    assert scene.notices.take() == []
    queues = [source.queue for source in scene.notices._open.values()]
    assert len(queues) == 3
    assert not any(queue.try_dequeue.called for queue in queues)  # type: ignore[attr-defined]
    scene.doorbell.look.assert_called_once()
    queues[1].pending.return_value = True  # type: ignore[attr-defined]
    queues[1].try_dequeue.side_effect = [DeathNotice(3, 12), None]  # type: ignore[attr-defined]
    assert scene.notices.take() == [RankId(3, 12)]


def test_an_agent_that_never_answers_is_asked_more_and_more_rarely_and_named_once(scene: Scene) -> None:
    scene.silent = {"a"}
    for _ in range(3):
        scene.join()
    pause_s = RETRY_S
    while pause_s < 2 * RETRY_MAX_S:
        scene.now += min(pause_s, RETRY_MAX_S) - 0.1
        assert scene.join() == []
        scene.now += 0.2
        assert scene.join() == ["a"]
        pause_s *= 2
    assert scene.warned.call_count == 1
    scene.notices.meet({"a": handle("a2"), "b": handle("b"), "c": handle("c")})
    assert scene.join() == ["a2"], "another agent of that name is asked at once"
    scene.notices.meet({})
    scene.join()
    assert not scene.notices._pauses
