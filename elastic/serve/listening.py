"""The listening sockets of a gateway, bound by it or handed down to it, and how many connections they may bring.

`elastic serve` binds them once and hands them to each gateway that it starts. So the ports are never free for another
process to take while a gateway dies and returns, and clients that connect meanwhile wait instead of being refused.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from membership.base.errors import ConfigError

LISTEN_FDS = "ELASTIC_LISTEN_FDS"  # in a gateway's environment: the descriptors of its two sockets, "7,8"
BACKLOG = 2048
ADMIN_CONNECTIONS = 32
OVERFLOW = 8  # connections beyond a port's limit, for probes
RESERVED = 96  # descriptors that are not clients': store, engine link, logs, files being read
FEWEST, DEFAULT_MOST = 16, 8192
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with; and how to reach it from this machine


class Addresses(Protocol):
    """Where to listen: options of `elastic serve` and `elastic gateway`."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def admin_host(self) -> str: ...
    @property
    def admin_port(self) -> int: ...


@dataclass(frozen=True)
class Listeners:
    """Both sockets."""

    api: socket.socket
    admin: socket.socket

    def __iter__(self) -> Iterator[socket.socket]:
        return iter((self.api, self.admin))

    def close(self) -> None:
        """Let go of them; the ports are free once no process has them."""
        for each in self:
            each.close()


@contextmanager
def listening(wanted: Addresses, inherited: Listeners | None = None) -> Iterator[Listeners]:
    """The sockets, closed at the end: those inherited, else new ones. ConfigError: an address cannot be used."""
    listeners = inherited or _bound(wanted)
    try:
        yield listeners
    finally:
        listeners.close()


def inherited_listeners(environ: MutableMapping[str, str] = os.environ) -> Listeners | None:
    """What this process was started with, not inherited any further; None: nothing."""
    given = environ.pop(LISTEN_FDS, "")
    if not given:
        return None
    api, admin = (int(each) for each in given.split(","))
    for descriptor in (api, admin):
        os.set_inheritable(descriptor, False)
    return Listeners(socket.socket(fileno=api), socket.socket(fileno=admin))


def urls_of(bound: Listeners, any_host: str | None = None, *, tls: bool = False) -> tuple[str, str]:
    """How to reach both. `tls`: there is a certificate."""
    return url_of(bound.api, any_host, tls=tls), url_of(bound.admin, any_host, tls=tls and not is_loopback(bound.admin))


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def url_of(bound: socket.socket, any_host: str | None = None, *, tls: bool = False) -> str:
    """How to reach the socket; `any_host` replaces an address that means all of them (default: this machine's own)."""
    host, port = bound.getsockname()[:2]
    if host in ANY_ADDRESS:
        host = any_host or ANY_ADDRESS[host]
    shown = f"[{host.replace('%', '%25')}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{port}"


def _bound(wanted: Addresses) -> Listeners:
    if wanted.port and (wanted.port, wanted.host) == (wanted.admin_port, wanted.admin_host):
        raise ConfigError(f"--port and --admin-port are both {wanted.port}", hint="choose another --admin-port")
    api = bind(wanted.host, wanted.port, ("--host", "--port"))
    try:
        return Listeners(api, bind(wanted.admin_host, wanted.admin_port, ("--admin-host", "--admin-port")))
    except BaseException:
        api.close()
        raise


def bind(host: str, port: int, flags: Sequence[str]) -> socket.socket:
    """A listening socket; ConfigError, which names the two flags, if there can be none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # ValueError: not a name at all
        why = getattr(error, "strerror", None) or "it is not a host name"
        raise ConfigError(f"cannot listen on {host!r}: {why}", hint=f"check {flags[0]}") from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)  # without TCP's name asyncio has Nagle's algorithm delay answers
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        hint = f"choose another {flags[1]}, or check {flags[0]}"
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", hint=hint) from error
    return bound


def most_connections(descriptors: int, wanted: int | None = None) -> int:
    """How many connections the API's port takes, of a process with so many descriptors. ConfigError: too few."""
    room = descriptors - RESERVED - ADMIN_CONNECTIONS - 2 * OVERFLOW
    least = descriptors - room + (wanted or FEWEST)
    if room < (wanted or FEWEST):
        what = f"{wanted} connections" if wanted else "a gateway"
        raise ConfigError(
            f"the limit of open files is {descriptors}: {what} need at least {least}",
            hint=f"raise it (ulimit -Hn {least})" + (", or lower --max-connections" if wanted else ""),
        )
    return wanted or min(room, DEFAULT_MOST)
