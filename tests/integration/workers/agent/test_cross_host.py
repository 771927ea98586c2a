"""Calls by a process that is not the ranks' parent, as across hosts: own queues, plain data, no kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from membership.base.errors import RankDied, RankError, RankFailed
from membership.base.rank_id import RankId
from tests.support.executors import executor, launch
from tests.support.helpers import eventually
from workers.agent.cross_host import CrossHostCaller
from workers.agent.executor import Elsewhere, MultiprocExecutor

pytestmark = pytest.mark.integration

A, B = RankId(0, 1), RankId(1, 2)


@pytest.fixture
def caller() -> Iterator[CrossHostCaller]:
    made = CrossHostCaller("driver-calls")
    yield made
    made.close()


@pytest.fixture
def made(caller: CrossHostCaller) -> Iterator[MultiprocExecutor]:
    made = executor(elsewhere=Elsewhere(callers=(caller.handle(),)))
    for handle in launch(made, [A, B], 30):
        assert len(handle.peer_response_handles) == 1
        caller.adopt(handle.key, handle.peer_response_handles[0])
    yield made
    made.shutdown()


def test_both_callers_get_their_own_replies(made: MultiprocExecutor, caller: CrossHostCaller) -> None:
    assert caller.collective_rpc("echo", 30, ["there"]) == [[0, "there"], [1, "there"]]
    assert made.collective_rpc("echo", 30, ("here",)) == [(0, "here"), (1, "here")]
    assert caller.collective_rpc("later", 30, [0.05, "made later"]) == ["made later"] * 2
    with pytest.raises(RankFailed, match="rank 1 was asked to fail"):
        caller.submit("fail", [1], output_rank=0, timeout_s=30).future.result(timeout=30)


def test_only_plain_data_crosses_hosts(made: MultiprocExecutor, caller: CrossHostCaller) -> None:
    with pytest.raises(RankError, match="cannot be sent"):
        caller.collective_rpc("echo", 30, [object()])
    with pytest.raises(RankFailed, match="private"):
        caller.collective_rpc("__init__", 30)
    with pytest.raises(RankFailed, match="TypeError"):
        caller.collective_rpc("unpicklable", 30)
    assert made.collective_rpc("echo", 30, (1,)) == [(0, 1), (1, 1)]


def test_a_rank_that_died_fails_the_calls_of_both(made: MultiprocExecutor, caller: CrossHostCaller) -> None:
    pending = caller.submit("sleep", [5.0], timeout_s=30)
    os.kill(made.workers[B].child.pid, signal.SIGKILL)
    with pytest.raises(RankDied, match="rank 1"):
        pending.future.result(timeout=30)
    with pytest.raises(RankDied, match="rank 1"):
        caller.submit("echo", [1], keys=[B], timeout_s=30).future.result(timeout=30)


def test_ranks_outlive_a_caller_that_is_not_their_parent() -> None:
    caller = CrossHostCaller("driver-calls")
    made = executor(elsewhere=Elsewhere(callers=(caller.handle(),)))
    try:
        launch(made, [A], 30)
        caller.close()
        eventually(lambda: made.collective_rpc(lambda worker: worker.polls > 0, 30) == [True], 30, "the rank goes on")
        assert made.collective_rpc("echo", 30, (1,)) == [(0, 1)]
    finally:
        made.shutdown()
