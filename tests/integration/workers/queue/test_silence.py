"""A host that falls silent, in network namespaces: whichever direction is cut, and not when it is merely stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import pytest

from chaos.faults.cuts import CUTS
from chaos.faults.netns import Network
from membership.base.errors import QueueSilent, QueueTimeout
from tests.support import ROOT
from tests.support.helpers import eventually, hang
from tests.support.hosts import own_namespaces
from workers.queue import remote_reader
from workers.queue.curve import new_keys
from workers.queue.data_port import CAN_SEAL
from workers.queue.handle import Handle
from workers.queue.message_queue import MessageQueue
from workers.queue.remote_reader import RemoteReader
from workers.queue.silence import OtherHosts

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces take root"),
]

WAIT_S = 30.0
OURS, THEIRS = new_keys(), new_keys()
WRITER = (
    "import sys, threading\nfrom workers.queue.message_queue import *\n"
    "ours = CurveKeys(*(a.encode() for a in sys.argv[1:3]))\n"
    "queue = MessageQueue('far', MsgpackCodec(), remote=Remote(sys.argv[4], ours, frozenset([sys.argv[3].encode()])))\n"
    "print(queue.export_handle().encode().hex(), flush=True)\n"
    "for line in sys.stdin:\n    queue.enqueue(line.strip())\n"
)


class Scene:
    """A writer on host b, or another one, and what reads on host a."""

    def __init__(self, network: Network, ends: ExitStack, host: str = "b") -> None:
        self.network = network
        b = network[host]
        arguments = [OURS.public.decode(), OURS.secret.decode(), THEIRS.public.decode(), b.address]
        self.writer = b.run(
            lambda: subprocess.Popen(
                [sys.executable, "-c", WRITER, *arguments],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        ends.callback(self.writer.communicate, timeout=WAIT_S)
        ends.callback(self.writer.kill)
        assert self.writer.stdout is not None
        handle = Handle.decode(bytes.fromhex(self.writer.stdout.readline()))
        self._handle = msgspec.structs.replace(handle, host=f"host {host}")

    def join(self, reader_id: str, others: OtherHosts | None = None) -> MessageQueue:
        def made() -> MessageQueue:
            return MessageQueue.create_from_handle(self._handle, reader_id, timeout_s=WAIT_S, keys=THEIRS)

        far = self.network["a"].run(made)
        far.end_on_silence(others or OtherHosts())
        return far

    def send(self, line: str) -> None:
        assert self.writer.stdin is not None
        self.writer.stdin.write(line + "\n")
        self.writer.stdin.flush()


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with ExitStack() as ends:
        yield Scene(ends.enter_context(Network(["a", "b", "c"])), ends)
    assert own_namespaces() == set()


@pytest.mark.parametrize("fault", ["host-cut-off", "host-deaf", "host-mute", "host-link-down"])
def test_a_host_that_is_cut_off_is_suspected(scene: Scene, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if only what it sends, or only what is sent to it, is lost."""
    monkeypatch.setattr(remote_reader, "REMOTE_SILENCE_S", 1e6)
    with scene.join(fault) as far:
        scene.send("hello")
        assert far.dequeue(WAIT_S) == "hello"
        injector = CUTS[fault][1](scene.network["b"], [scene.network["a"]])
        try:
            injector.inject()
            with pytest.raises(QueueSilent, match="silent") as silent:
                far.dequeue(WAIT_S)
            assert silent.value.silent_s >= 0.2
        finally:
            injector.heal()


def reader_of(queue: MessageQueue) -> RemoteReader:
    assert isinstance(queue._end, RemoteReader)
    return queue._end


def test_where_all_others_are_silent_it_is_our_own_host_that_is_cut_off(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is given up, until one answers and another does not."""
    monkeypatch.setattr(remote_reader, "REMOTE_SILENCE_S", 1e6)
    network, others = scene.network, OtherHosts()
    with ExitStack() as ends:
        both = scene, Scene(network, ends, "c")
        queues = [ends.enter_context(each.join("ours", others)) for each in both]
        injector = CUTS["host-cut-off"][1](network["a"], [network["b"], network["c"]])
        try:
            injector.inject()
            eventually(
                lambda: all(reader_of(each)._connection._silence.lasted_s > 0.6 for each in queues), WAIT_S, "a silence"
            )
            assert others.cut_off(time.monotonic())
            assert not any(each.pending() for each in queues)
        finally:
            injector.heal()
        for each, queue in zip(both, queues, strict=True):
            each.send("still there")
            assert queue.dequeue(WAIT_S) == "still there"
        injector = CUTS["host-cut-off"][1](network["b"], [network["a"]])
        try:
            injector.inject()
            with pytest.raises(QueueSilent):
                queues[0].dequeue(WAIT_S)
            assert not queues[1].pending()
        finally:
            injector.heal()


@pytest.mark.skipif(shutil.which("iptables") is None or not CAN_SEAL, reason="takes iptables and a data connection")
def test_messages_go_around_a_data_connection_that_a_firewall_has_forgotten(scene: Scene) -> None:
    """ZeroMQ's connection beside it lives on: the queue does not end, and waits for no more than the silence."""
    with scene.join("forgotten") as far:
        reader = reader_of(far)
        eventually(lambda: reader._data is not None, WAIT_S, "a data connection")
        assert reader._data is not None
        port = reader._data._socket.getpeername()[1]
        drop = ["iptables", "-A", "INPUT", "-p", "tcp", "--sport", str(port), "-j", "DROP"]
        deaf = ["iptables", "-A", "OUTPUT", "-p", "tcp", "--dport", str(port), "-j", "DROP"]
        for rule in (drop, deaf):
            scene.network["a"].run(lambda rule=rule: subprocess.run(rule, check=True))
        try:
            scene.send("around it")
            assert far.dequeue(WAIT_S) == "around it"
        finally:
            scene.network["a"].run(lambda: subprocess.run(["iptables", "-F"], check=True))


def test_a_process_that_is_stopped_is_not_suspected(scene: Scene) -> None:
    """Nor is one that has no processor for a while: its host's kernel acknowledges."""
    with scene.join("patient") as far:
        reader = far._end
        assert isinstance(reader, RemoteReader)
        hang(scene.writer.pid)
        try:
            until = time.monotonic() + 2.0
            eventually(lambda: reader._connection.looked_at > until, WAIT_S, "looks over two seconds")
            with pytest.raises(QueueTimeout):
                far.dequeue(0.01)
        finally:
            os.kill(scene.writer.pid, signal.SIGCONT)
        scene.send("still here")
        assert far.dequeue(WAIT_S) == "still here"
