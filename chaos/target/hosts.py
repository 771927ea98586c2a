"""Hosts made of this machine: network namespaces on one bridge, each with its own host name, address and loopback.

For the demo, benchmarks and tests. Processes of different hosts have a file system in common, and nothing else: no Unix
socket in one is handed memory by another, as `this_host` differs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from membership.base.errors import ConfigError

TOOL_S = 60.0
PREFIX = "ee"  # then the owner's process id: the names of interfaces are short


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, timeout=TOOL_S, encoding="utf-8").stdout


class Hosts:
    """`addresses[name]` is a host's; `outside` is ours on the same network, at the interface `bridge`."""

    def __init__(self, addresses: dict[str, str], outside: str, names: dict[str, str], bridge: str = "") -> None:
        self.addresses, self.outside, self.bridge = addresses, outside, bridge
        self._names = names

    def command(self, host: str, *command: str) -> list[str]:
        """The same command, on that host."""
        inside = ["ip", "netns", "exec", self._names[host], "unshare", "--uts", "sh", "-c"]
        return [*inside, f'hostname {host} && exec "$@"', "sh", *command]

    def namespace(self, host: str) -> str:
        """Name of its network namespace."""
        return self._names[host]

    def slow(self, host: str, rate: str) -> None:
        """Let it send so much per second, as "1mbit"."""
        queue = ("root", "tbf", "rate", rate, "burst", "4kb", "latency", "1s")
        _run("tc", "-n", self._names[host], "qdisc", "replace", "dev", "eth0", *queue)

    def slowed(self, host: str) -> int:
        """How many packets had to wait since."""
        shown = _run("tc", "-n", self._names[host], "-s", "qdisc", "show", "dev", "eth0")
        return sum(map(int, re.findall(r"overlimits (\d+)", shown)))

    def fast(self, host: str) -> None:
        """As before."""
        _run("tc", "-n", self._names[host], "qdisc", "del", "dev", "eth0", "root")

    def cut(self, host: str) -> None:
        """Pull its cable: nothing is answered or refused from there any more."""
        _run("ip", "-n", self._names[host], "link", "set", "eth0", "down")

    def kill(self, host: str) -> int:
        """Its power fails: SIGKILL to all processes there, before any of them can tell another; how many there were."""
        killed: set[int] = set()
        while pids := _run("ip", "netns", "pids", self._names[host]).split():
            for pid in map(int, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            for pid in map(int, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed |= set(map(int, pids))
        return len(killed)

    def heal(self, host: str) -> None:
        """Plug it in again."""
        _run("ip", "-n", self._names[host], "link", "set", "eth0", "up")

    def cut_ports(self, host: str, ports: Iterable[int]) -> None:
        """Lose what it sends in TCP connections with these ports, at either end. What others send arrives."""
        self._rules("add", host, ports)

    def heal_ports(self, host: str, ports: Iterable[int]) -> None:
        """Lose it no more."""
        self._rules("del", host, ports)

    def _rules(self, verb: str, host: str, ports: Iterable[int]) -> None:
        for port in ports:
            for end in ("sport", "dport"):
                _run("ip", "-n", self._names[host], "rule", verb, "ipproto", "tcp", end, str(port), "blackhole")

    def start(self, host: str, command: list[str], output: Path, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start it there, in a session of its own."""
        with output.open("ab") as out:
            return subprocess.Popen(
                self.command(host, *command), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, env={**os.environ, **environ},
            )  # fmt: skip


@contextmanager
def made_hosts(*hosts: str) -> Iterator[Hosts]:
    """Make them. ConfigError where that is not allowed."""
    number = os.getpid()
    net = f"10.{64 + number % 128}.{number // 128 % 256}"
    bridge = f"{PREFIX}{number}"
    names = {host: f"{bridge}-{host}" for host in hosts}
    addresses = {host: f"{net}.{index}" for index, host in enumerate(hosts, 1)}
    _sweep()
    with ExitStack() as undo:
        try:
            _run("ip", "link", "add", bridge, "type", "bridge")
            undo.callback(_run, "ip", "link", "del", bridge)
            _run("ip", "addr", "add", f"{net}.254/24", "dev", bridge)
            _run("ip", "link", "set", bridge, "up")
            for index, host in enumerate(hosts):
                name, cable = names[host], f"{bridge}v{index}"
                _run("ip", "netns", "add", name)
                undo.callback(_run, "ip", "netns", "del", name)
                _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
                undo.callback(
                    _run, "ip", "link", "del", cable
                )  # a namespace ends with its last process, some time later
                _run("ip", "link", "set", cable, "master", bridge, "up")
                _run("ip", "-n", name, "addr", "add", f"{addresses[host]}/24", "dev", "eth0")
                _run("ip", "-n", name, "link", "set", "eth0", "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
            _run(*Hosts(addresses, "", names).command(hosts[0], "true"))
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", "") or str(error)
            hint = "it takes root, iproute2, and a kernel or container that lets root make them"
            raise ConfigError(f"network namespaces cannot be made here: {why.strip()}", hint=hint) from error
        yield Hosts(addresses, f"{net}.254", names, bridge)


def _sweep() -> None:
    """Delete what processes have left that were killed."""
    for kind in (Path("/run/netns"), Path("/sys/class/net")):  # with a namespace go its cables
        for left in kind.iterdir() if kind.exists() else ():
            found = re.fullmatch(rf"{PREFIX}(\d+)(-.+)?", left.name)
            if found is not None and not Path("/proc", found[1]).exists():
                what = ("ip", "netns", "del") if found[2] else ("ip", "link", "del")
                with suppress(OSError, subprocess.CalledProcessError):
                    _run(*what, left.name)
