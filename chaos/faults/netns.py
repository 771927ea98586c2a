"""Hosts as network namespaces, joined by a bridge in a namespace of its own; this machine's network is not touched.

A thread that enters a namespace passes it on to its threads, processes and sockets. So a process or server that is
started by a function under `Host.run` runs in that namespace. It takes root and pyroute2.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from chaos.faults.base import NotInjected
from membership.base.errors import WaitTimeout

SUBNET = "10.213.77"
PREFIX = "chaos-"  # then the owner's process id, so that namespaces of a dead owner are found and deleted
HINT = "it takes root, nf_tables, and `pip install 'elastic-ep[chaos]'` (pyroute2)"
RUN_TIMEOUT_S = 60.0
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
        """The name of its namespace."""
        return self.network.namespace(self.name)

    @property
    def port(self) -> str:
        """The name of the switch's end of its link."""
        return f"to-{self.address.rpartition('.')[2]}"

    def run(self, work: Callable[[], T], timeout_s: float = RUN_TIMEOUT_S) -> T:
        """Call `work` in this namespace, in a thread of its own."""
        return inside(self.namespace, work, timeout_s)

    def plug(self, *, up: bool) -> None:
        """Set the switch's end of its link up or down."""
        with routes(self.network.switch) as switch:
            switch.link("set", index=_index(switch, self.port), state="up" if up else "down")

    def has_carrier(self) -> bool:
        """Whether its link is up at both ends."""
        with routes(self.namespace) as mine:
            return bool(mine.get_links(_index(mine, "eth0"))[0].get_attr("IFLA_CARRIER"))

    def connect(self) -> None:
        """Connect it to the switch and open its probe port."""
        with routes(self.network.switch) as switch:
            peer = {"ifname": "eth0", "net_ns_fd": self.namespace}
            switch.link("add", ifname=self.port, kind="veth", peer=peer)
            switch.link("set", index=_index(switch, self.port), master=_index(switch, "bridge"), state="up")
        with routes(self.namespace) as mine:
            mine.addr("add", index=_index(mine, "eth0"), address=self.address, prefixlen=24)
            for device in ("lo", "eth0"):
                mine.link("set", index=_index(mine, device), state="up")
        self.listener = self.run(lambda: _listener(self.address))


class Network:
    """Hosts by name, all on one switch. A context manager; at its end every namespace is deleted."""

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
        """Name of the namespace of the bridge."""
        return self.namespace("switch")

    def __enter__(self) -> Network:
        sweep()
        try:
            self._make(self.switch)
            with routes(self.switch) as switch:
                switch.link("add", ifname="bridge", kind="bridge")
                switch.link("set", index=_index(switch, "bridge"), state="up")
            for host in self.hosts.values():
                self._make(host.namespace)
                host.connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for host in self.hosts.values():
            if host.listener is not None:
                host.listener.close()
        while self._made:
            delete(self._made.pop())

    def _make(self, namespace: str) -> None:
        create(namespace)
        self._made.append(namespace)


@contextmanager
def netlink(what: str) -> Iterator[Any]:
    """The package pyroute2, for calls to the kernel; NotInjected if it is missing or the kernel refuses."""
    try:
        import pyroute2
    except ImportError as error:
        raise NotInjected(f"{what}: pyroute2 is not installed", hint=HINT) from error
    try:
        yield pyroute2
    except (pyroute2.NetlinkError, OSError) as error:
        raise NotInjected(f"{what}: {error}", hint=HINT) from error


@contextmanager
def routes(namespace: str) -> Iterator[Any]:
    """The links and addresses of a namespace, as pyroute2 has them."""
    with netlink(f"network namespace {namespace}") as pyroute2, pyroute2.NetNS(namespace, flags=0) as found:
        yield found


def _index(found: Any, device: str) -> int:
    """The index of a device."""
    return int(found.link_lookup(ifname=device)[0])


def create(namespace: str) -> None:
    """Make a namespace."""
    with netlink(f"network namespace {namespace}") as pyroute2:
        pyroute2.netns.create(namespace)


def delete(namespace: str) -> None:
    """Delete a namespace."""
    with netlink(f"network namespace {namespace}") as pyroute2:
        pyroute2.netns.remove(namespace)


def namespaces() -> set[str]:
    """All named namespaces of this machine."""
    with netlink("network namespaces") as pyroute2:
        return set(pyroute2.netns.listnetns())


def sweep() -> None:
    """Delete namespaces whose owner was killed."""
    for name in namespaces():
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            delete(name)


def inside(namespace: str, work: Callable[[], T], timeout_s: float = RUN_TIMEOUT_S) -> T:
    """Call `work` in a thread that is in a namespace; returns its result or raises its exception."""
    done: list[T] = []
    failed: list[BaseException] = []

    def enter_and_work() -> None:
        try:
            with netlink(f"entering network namespace {namespace}") as pyroute2:
                pyroute2.netns.setns(namespace, 0)  # of this thread only
            done.append(work())
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=enter_and_work, name=f"in-{namespace}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failed:
        raise failed[0]
    if not done:
        raise WaitTimeout(f"work in network namespace {namespace} took more than {timeout_s:g} s")
    return done[0]


def _listener(address: str) -> socket.socket:
    """A listening socket. The kernel completes connections by itself; no thread is needed."""
    listener = socket.create_server((address, PROBE_PORT), backlog=4096)
    listener.setblocking(False)
    return listener
