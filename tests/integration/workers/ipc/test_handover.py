"""Handover between real processes: memory and descriptors arrive, death is noticed, refusals are typed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from membership.base.errors import QueueClosed
from membership.base.run_dir import ENV, default_run_dir, entered, make_run_dir, sweep
from tests.support.helpers import eventually, let_all_in
from workers.ipc.doorbell import Bell, Doorbell
from workers.ipc.handover import Grant, Handover, HandoverRefused, Link
from workers.ipc.shared_memory import Segment

pytestmark = pytest.mark.integration

CHILD = """
import sys, time
from workers.ipc.handover import Handover
from workers.ipc.shared_memory import Segment
from workers.ipc.doorbell import Bell
link = Handover.default().connect(sys.argv[1], "thing", b"hi")
segment = Segment.attach(link.reply_fds[0])
bell = Bell.attach(link.reply_fds[1])
segment.view()[:2] = link.reply
bell.ring()
time.sleep(60)
"""


def test_a_process_gets_memory_rings_and_its_death_is_noticed() -> None:
    gone, links = threading.Event(), []
    with Segment.create(100) as segment, Doorbell() as bell:

        def grant(link: Link, request: bytes, fds: list[int]) -> Grant:
            links.append(link)
            assert request == b"hi"
            return Grant(b"ok", [segment.fileno(), bell.fileno()], on_gone=lambda _: gone.set())

        Handover.default().serve("thing", grant)
        child = subprocess.Popen([sys.executable, "-c", CHILD, Handover.default().address])
        try:
            view = segment.view()
            assert bell.wait(lambda: view[0], timeout_s=20)
            assert bytes(view[:2]) == b"ok"
            assert links[0].peer_pid == child.pid
            assert not links[0].peer_closed()
            child.send_signal(signal.SIGKILL)
            assert gone.wait(30)
        finally:
            Handover.default().withdraw("thing")
            child.kill()
            child.wait(30)


def test_refusals_and_absence_are_typed() -> None:
    with pytest.raises(HandoverRefused, match="no such resource"):
        Handover.default().connect(Handover.default().address, "nothing")
    with pytest.raises(QueueClosed, match="is gone"):
        Handover.default().connect(str(default_run_dir() / "never-was.sock"), "nothing")

    def refuse(link: Link, request: bytes, fds: list[int]) -> Grant:
        raise HandoverRefused("not for you")

    Handover.default().serve("mine", refuse)
    with pytest.raises(HandoverRefused, match="not for you"):
        Handover.default().connect(Handover.default().address, "mine")
    Handover.default().withdraw("mine")


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
STRANGER = 4321


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory in which a socket's path is not too long, as it may be in pytest's."""
    with tempfile.TemporaryDirectory(prefix="ep-") as made:
        yield Path(made)


@pytest.fixture
def handover(short: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Handover]:
    """One with a run directory of its own."""
    monkeypatch.setenv(ENV, str(short / "run"))
    handover = Handover()
    yield handover
    handover.close()


def test_a_socket_is_there_as_long_as_its_process(handover: Handover) -> None:
    path = Path(handover.address)
    assert path.is_socket()
    handover.close()
    assert list(path.parent.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.ipc.handover.sweep", partial(sweep, newborn_s=0.0))
    script = "from workers.ipc.handover import Handover; print(Handover.default().address, flush=True); input()"
    environ = {**os.environ, ENV: str(short / "run")}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        left = Path(child.stdout.readline().strip())
        child.kill()
    assert left.is_socket()
    monkeypatch.setenv(ENV, str(short / "run"))
    handover = Handover()
    assert not left.exists()
    handover.close()


@needs_root
def test_a_directory_of_another_user_is_not_connected_to() -> None:
    with tempfile.TemporaryDirectory(prefix="ep-") as short:  # a socket's path must be
        foreign = make_run_dir(Path(short) / "foreign")
        os.chown(foreign, STRANGER, -1)
        with pytest.raises(HandoverRefused, match=f"belongs to user {STRANGER}, we are user 0"):
            Handover.default().connect(str(foreign / "any.sock"), "thing")


@needs_root
def test_a_listener_of_another_user_is_not_believed(handover: Handover) -> None:
    """Not even in our own directory, where only root can have put it."""
    run = Path(handover.address).parent
    with entered(run) as inside, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bound:
        bound.bind(str(inside / "impostor.sock"))
        script = f"import os, socket; os.setuid({STRANGER}); s = socket.socket(fileno={bound.fileno()}); s.listen()"
        subprocess.run([sys.executable, "-c", script], pass_fds=[bound.fileno()], check=True, timeout=20)
        with pytest.raises(HandoverRefused, match=f"belongs to user {STRANGER}, we are user 0"):
            handover.connect(str(run / "impostor.sock"), "thing", b"secret")
        accepted, _ = bound.accept()
        with accepted:
            assert accepted.recv(100) == b"", "it was sent something"


@needs_root
def test_another_user_is_not_let_in_where_the_directory_is_open_by_mistake(
    handover: Handover, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who connects is checked, too. Refusals are logged once per period, however many there are."""
    asked: list[bytes] = []

    def grant(link: Link, request: bytes, fds: list[int]) -> Grant:
        asked.append(request)
        return Grant(b"secret")

    handover.serve("thing", grant)
    let_all_in(Path(handover.address))
    script = (
        f"import os, socket, sys; os.setuid({STRANGER})\n"
        "for _ in range(20):\n"
        "    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n"
        "    print(s.recv(100))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, handover.address], capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout.split() == ["b''"] * 20
    assert asked == []
    logged = [line for line in "".join(capfd.readouterr()).splitlines() if "link_refused" in line]
    assert len(logged) == 1
    assert f"belongs to user {STRANGER}" in logged[0]


def test_a_dismissed_peer_lets_go() -> None:
    links: list[Link] = []
    ended, dismissed = threading.Event(), threading.Event()

    def grant(link: Link, request: bytes, fds: list[int]) -> Grant:
        links.append(link)
        return Grant(on_gone=lambda _: ended.set())

    Handover.default().serve("thing", grant)
    Handover.default().connect(Handover.default().address, "thing", on_gone=lambda _: dismissed.set())
    links[0].dismiss()
    assert dismissed.wait(30)
    assert ended.wait(30)
    Handover.default().withdraw("thing")


def test_messages_and_descriptors_travel_both_ways() -> None:
    received: list[bytes] = []
    answers: list[bytes] = []

    def on_message(link: Link, data: bytes, fds: list[int]) -> None:
        with open(os.dup(fds[0]), "rb") as file:
            received.append(data + file.read(3))
        link.send(b"thanks")

    Handover.default().serve("post", lambda link, request, fds: Grant(on_message=on_message))
    link = Handover.default().connect(
        Handover.default().address, "post", on_message=lambda link, data, fds: answers.append(data)
    )
    with open("/dev/zero", "rb") as zero:
        link.send(b"read", [zero.fileno()])
    eventually(lambda: answers == [b"thanks"], 30, "the answer")
    assert received == [b"read\0\0\0"]
    link.close()
    Handover.default().withdraw("post")


def test_a_bare_fork_keeps_no_hidden_copy_of_a_link() -> None:
    gone = threading.Event()
    Handover.default().serve("thing", lambda link, request, fds: Grant(on_gone=lambda _: gone.set()))
    script = (
        "import os,sys,time\nfrom workers.ipc.handover import Handover\n"
        "Handover.default().connect(sys.argv[1], 'thing')\n"
        "if os.fork() == 0:\n    print(os.getpid(), flush=True); time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, Handover.default().address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        try:
            child.kill()
            child.wait(30)
            assert gone.wait(30), "the forked copy of the socket hid the death of its owner"
            assert Path(f"/proc/{grandchild}").exists()
        finally:
            os.kill(grandchild, signal.SIGKILL)
            Handover.default().withdraw("thing")


def test_many_ringers_no_lost_wakeup() -> None:
    """Rings race with the waiter's way to sleep; a lost one would show as a wait that runs into its deadline."""
    rounds, ringers = 3000, 3
    with Doorbell(spin_us=0) as bell, Segment.create(4096) as segment:
        words = segment.view(format="Q")

        def ring(number: int) -> None:
            ringer = Bell.attach(bell.fileno())
            for turn in range(1, rounds + 1):
                words[number * 8] = turn
                ringer.ring()
                if turn % 7 == number:
                    time.sleep(0)
            ringer.close()

        threads = [threading.Thread(target=ring, args=(number,)) for number in range(ringers)]
        for thread in threads:
            thread.start()
        seen = 0
        while seen < rounds * ringers:
            total = sum(words[number * 8] for number in range(ringers))
            if total == seen:
                before = seen
                assert bell.wait(lambda before=before: sum(words[w * 8] for w in range(ringers)) > before, 5)
            seen = sum(words[number * 8] for number in range(ringers))
        for thread in threads:
            thread.join(30)
