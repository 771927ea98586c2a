"""The zygote makes forkservers for agents; a dead one is replaced, one that hangs is ended, and no caller waits on."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from membership.base.timing import FORKSERVER_FORK_S
from tests.support.helpers import eventually, hang, running
from workers.agent.forkserver_client import FORKSERVER_FD, ForkServer
from workers.agent.zygote import Zygote

pytestmark = pytest.mark.integration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def zygote(tmp_path: Path, clock: Clock) -> Iterator[Zygote]:
    made = Zygote((), os.environ, tmp_path / "log", clock=clock)
    eventually(made._serving.is_set, 60.0, "the zygote to serve")
    yield made
    made.close()


def serves(link: socket.socket, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether an agent that was given this has a forkserver."""
    monkeypatch.setenv(FORKSERVER_FD, str(link.detach()))
    served: list[object] = []
    with ForkServer((), on_exit=lambda pid, status: None, on_serving=served.append) as forkserver:
        eventually(lambda: served or not forkserver.alive, 60.0, "an answer, or the end")
        return bool(served)


def test_a_dead_one_is_replaced(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serves(zygote.forkserver(), monkeypatch)
    zygote._server.kill()
    eventually(lambda: not zygote._server.alive, 60.0, "its end to be noticed")
    assert serves(zygote.forkserver(), monkeypatch)


def test_once_it_is_closed_what_it_made_has_ended(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with much memory is still ending when a small one, killed at the same time, is gone."""
    monkeypatch.setenv(FORKSERVER_FD, str(zygote.forkserver().detach()))
    served: list[object] = []
    large = ("tests.support.large_process:grow",)
    with ForkServer(large, on_exit=lambda pid, status: None, on_serving=served.append):
        eventually(lambda: served, 60.0, "a forkserver")
        assert zygote._server.process is not None
        (made,) = psutil.Process(zygote._server.process.pid).children()
        zygote.close()
        assert not running(made)


def test_one_that_hangs_is_ended_and_who_waits_for_it_reads_so(
    zygote: Zygote, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = zygote._server.process
    assert process is not None
    hang(process.pid)
    eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, 60.0, "it to be stopped")
    waiting = zygote.forkserver()
    clock.now += FORKSERVER_FORK_S
    zygote.tend()
    assert process.poll() is None, "it has until then"
    clock.now += 0.1
    zygote.tend()
    assert process.wait(timeout=60.0) == -signal.SIGKILL
    assert not serves(waiting, monkeypatch)
    eventually(lambda: not zygote._server.alive, 60.0, "its end to be noticed")
    assert serves(zygote.forkserver(), monkeypatch)
