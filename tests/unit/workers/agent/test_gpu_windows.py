"""The windows that an agent keeps, with memfds for GPU memory: one per slot, for whoever is in it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from membership.base.errors import ConfigError, WaitTimeout
from tests.support.helpers import eventually
from workers.agent import gpu_windows
from workers.agent.gpu_windows import GpuWindows
from workers.ipc.handover import HandoverRefused
from workers.protocol import window_client
from workers.protocol.window_client import WindowAsked, slots_of, window_of

pytestmark = pytest.mark.unit

ASKED = WindowAsked(slot=1, shape="small", own=False)
OWN = WindowAsked(slot=1, shape="small", own=True)


@pytest.fixture
def windows() -> Iterator[GpuWindows]:
    made = GpuWindows()
    yield made
    made.close()


def make(text: bytes = b"first") -> tuple[int, int]:
    fd = os.memfd_create("a-window")
    os.write(fd, text)
    return fd, len(text)


def refuse() -> tuple[int, int]:
    pytest.fail("there is one already")


def read(windows: GpuWindows, asked: WindowAsked = ASKED, made: bytes = b"first") -> bytes:
    with window_of(windows.handle(), asked, lambda: make(made)) as (fd, nbytes):
        return os.pread(fd, nbytes, 0)


def test_the_first_to_ask_makes_it_and_all_others_get_the_same(windows: GpuWindows) -> None:
    assert read(windows) == b"first"
    with window_of(windows.handle(), ASKED, refuse) as (fd, nbytes):
        assert (os.pread(fd, 9, 0), nbytes) == (b"first", 5)
    assert read(windows, WindowAsked(2, "small", own=False), b"second") == b"second"


def test_of_two_that_make_it_at_once_one_counts(windows: GpuWindows) -> None:
    def late() -> tuple[int, int]:
        assert read(windows, made=b"the other") == b"the other"
        return make()

    with window_of(windows.handle(), ASKED, late) as (fd, nbytes):
        assert os.pread(fd, nbytes, 0) == b"the other"


def test_another_layout_is_refused(windows: GpuWindows) -> None:
    read(windows)
    with pytest.raises(HandoverRefused, match="is for small, not for large"):
        read(windows, WindowAsked(1, "large", own=False))
    with pytest.raises(ConfigError), window_of(b"", ASKED, make):
        pass


CHILD = """
import sys, time
from workers.protocol.window_client import WindowAsked, slots_of, window_of
with window_of(bytes.fromhex(sys.argv[1]), WindowAsked(1, "small", True), None): print("has it", flush=True)
time.sleep(600)
"""


def in_the_slot(windows: GpuWindows) -> subprocess.Popen[str]:
    """A process that has claimed the slot, and stays."""
    process = subprocess.Popen([sys.executable, "-c", CHILD, windows.handle().hex()], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    return process


def test_a_successor_waits_for_the_end_of_who_had_the_slot(
    windows: GpuWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others do not: they only write where no live rank looks."""
    read(windows)
    before = in_the_slot(windows)
    try:
        assert read(windows) == b"first"
        monkeypatch.setattr(window_client, "WINDOW_TIMEOUT_S", 0.05)
        with pytest.raises(WaitTimeout, match="who had slot 1 before still runs"):
            read(windows, OWN)
        monkeypatch.undo()
        before.send_signal(signal.SIGKILL)  # not waited for here: that is the successor's part
        assert read(windows, OWN) == b"first"
        assert read(windows, OWN) == b"first", "it is the owner itself by now"
    finally:
        before.kill()
        before.wait(10)
        if before.stdout is not None:
            before.stdout.close()


def test_too_many_that_do_not_end_are_an_error(windows: GpuWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    read(windows)
    monkeypatch.setattr(gpu_windows, "MAX_FDS", 1)
    before = in_the_slot(windows)
    try:
        with pytest.raises(HandoverRefused, match="1 processes"):
            read(windows, OWN)
    finally:
        before.kill()
        before.wait(10)
        if before.stdout is not None:
            before.stdout.close()


def test_nothing_is_left_once_they_are_closed() -> None:
    def kept() -> int:
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return sum(os.path.lexists(link) and "a-window" in os.readlink(link) for link in links)

    windows = GpuWindows()
    read(windows)
    eventually(lambda: kept() == 1, 30.0, "the askers' descriptors to be closed")
    windows.close()
    assert kept() == 0


def test_which_there_are_can_be_asked_and_one_be_let_go(windows: GpuWindows) -> None:
    assert slots_of(windows.handle()) == ()
    read(windows)
    read(windows, WindowAsked(7, "small", own=True), b"second")
    assert set(slots_of(windows.handle())) == windows.numbers == {1, 7}
    windows.free(7)
    windows.free(8)
    assert slots_of(windows.handle()) == (1,)
    assert read(windows, WindowAsked(7, "large", own=False), b"another") == b"another"


def test_one_that_is_let_go_while_it_is_given_is_given_all_the_same(
    windows: GpuWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's main thread frees; the listener's answers."""
    read(windows)
    send = socket.send_fds

    def late(*arguments: Any) -> int:
        if arguments[2]:
            windows.free(ASKED.slot)
        return send(*arguments)

    monkeypatch.setattr(socket, "send_fds", late)
    with window_of(windows.handle(), ASKED, refuse) as (fd, nbytes):
        assert os.pread(fd, nbytes, 0) == b"first"
