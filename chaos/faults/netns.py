"""Hosts as network namespaces, joined by a bridge in one of its own: nothing of it touches this machine's network.

A thread that enters a namespace gives it to whatever it starts: threads, processes, sockets. So `Host.run` runs a
function there, and a process or server started by it lives there. It takes root and iproute2.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from chaos.faults.base import NotInjected
from membership.base.errors import WaitTimeout

NAMESPACES = Path("/run/netns")
SUBNET = "10.213.77"
PREFIX = "chaos-"  # then the owner's process id: what a dead owner left is taken away by the next
HINT = "network namespaces take root and iproute2 (`ip`)"
COMMAND_TIMEOUT_S = 10.0
RUN_TIMEOUT_S = 60.0
CLONE_NEWNET = 0x40000000
PROBE_PORT = 7
T = TypeVar("T")

_numbers = itertools.count(1)


class Host:
    """A namespace with a link to the switch, and a port that answers probes."""

    def __init__(self, network: Network, name: str, address: str) -> None:
        self.network, self.name, self.address = network, name, address
        self.listener: socket.socket | None = None

    @property
    def namespace(self) -> str:
        """Its name for `ip netns`."""
        return self.network.namespace(self.name)

    def run(self, work: Callable[[], T], timeout_s: float = RUN_TIMEOUT_S) -> T:
        """Do it in this namespace, in a thread of its own."""
        return inside(self.namespace, work, timeout_s)


class Network:
    """Hosts by name, all on one switch. A context manager; at its end every namespace is gone."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._prefix = f"{PREFIX}{os.getpid()}-{next(_numbers)}-"
        self.hosts = {name: Host(self, name, f"{SUBNET}.{i}") for i, name in enumerate(hosts, 1)}
        self._made: list[str] = []

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def namespace(self, name: str) -> str:
        """Name of a host's namespace."""
        return self._prefix + name

    @property
    def switch(self) -> str:
        """Name of the namespace that the bridge is in."""
        return self.namespace("switch")

    def port(self, host: Host) -> str:
        """Name of the switch's end of a host's link."""
        return f"to-{host.address.rpartition('.')[2]}"

    def __enter__(self) -> Network:
        sweep()
        try:
            self._make(self.switch)
            ip("-n", self.switch, "link", "add", "bridge", "up", "type", "bridge")
            for host in self.hosts.values():
                self._join(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for host in self.hosts.values():
            if host.listener is not None:
                host.listener.close()
        while self._made:
            ip("netns", "delete", self._made.pop())

    def _make(self, namespace: str) -> None:
        ip("netns", "add", namespace)
        self._made.append(namespace)

    def _join(self, host: Host) -> None:
        self._make(host.namespace)
        port = self.port(host)
        ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
        ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", host.namespace, "link", "set", device, "up")
        host.listener = host.run(lambda: _listener(host.address))


def ip(*words: str) -> str:
    """Run iproute2; what it says. NotInjected if it cannot be run or refuses."""
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise NotInjected("there is no `ip` here", hint=HINT) from error
    if done.returncode:
        raise NotInjected(f"ip {' '.join(words)}: {done.stderr.strip()}", hint=HINT)
    return done.stdout


def namespaces() -> set[str]:
    """All named namespaces of this machine."""
    return set(os.listdir(NAMESPACES)) if NAMESPACES.is_dir() else set()


def sweep() -> None:
    """Delete namespaces whose owner is gone: it was killed."""
    for name in namespaces():
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            ip("netns", "delete", name)


def inside(namespace: str, work: Callable[[], T], timeout_s: float = RUN_TIMEOUT_S) -> T:
    """Do it in a thread that is in a namespace; its result, or what it raises."""
    done: list[T] = []
    failed: list[BaseException] = []

    def enter_and_work() -> None:
        try:
            _enter(namespace)
            done.append(work())
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=enter_and_work, name=f"in-{namespace}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failed:
        raise failed[0]
    if not done:
        raise WaitTimeout(f"what was to be done in namespace {namespace} took more than {timeout_s:g} s")
    return done[0]


def _enter(namespace: str) -> None:
    descriptor = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise NotInjected(f"cannot enter {namespace}: {os.strerror(ctypes.get_errno())}", hint=HINT)
    finally:
        os.close(descriptor)


def _listener(address: str) -> socket.socket:
    """The kernel itself completes connections to it: no thread is needed."""
    listener = socket.create_server((address, PROBE_PORT), backlog=4096)
    listener.setblocking(False)
    return listener
