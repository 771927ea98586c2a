"""This host among others: the address at which they reach it, and the secret that all hosts of a cluster share.

While that secret is replaced a host has two: it listens with the one that the cluster's config names, and connects with
either. They are lines of a file that is read again, so that no process need be started anew for another line.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from membership.base.errors import ConfigError
from membership.base.text_file import text_of

SECRET_MIN_BYTES = 20
LAST_PORT = (1 << 16) - 1

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Ports:
    """Where this host's processes may listen: `first` to `last`; 0: the kernel chooses."""

    first: int = 0
    last: int = 0

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


ANY_PORT = Ports()


@dataclass(frozen=True)
class Network:
    """`address` is bound on this host, and other hosts connect to it. Who has the secret belongs to `cluster`."""

    address: str
    cluster: str
    secret: bytes = field(repr=False)  # to listen with
    ports: Ports = ANY_PORT
    others: tuple[bytes, ...] = field(default=(), repr=False)  # with which other processes may listen
    file: Path | None = None  # that has all of them; None: they cannot change
    retired: frozenset[str] = frozenset()  # public halves of those with which nothing may listen any more

    def __post_init__(self) -> None:
        shortest = min(map(len, self.secrets))
        if shortest < SECRET_MIN_BYTES:
            raise ConfigError(
                f"the join secret has {shortest} bytes, and needs at least {SECRET_MIN_BYTES}",
                hint="write 32 random bytes as hexadecimal digits into --join-secret-file",
            )

    @property
    def secrets(self) -> tuple[bytes, ...]:
        """All that this host has; the one to listen with comes first."""
        return (self.secret, *self.others)

    def listening_with(self, secret: bytes) -> Network:
        """The same with another one of its secrets in front."""
        return replace(self, secret=secret, others=tuple(each for each in self.secrets if each != secret))

    def read_again(self) -> Network:
        """With the secrets that the file has by now. A file that cannot be used changes nothing, and is logged."""
        if self.file is None:
            return self
        try:
            first, *others = read_secrets(self.file)
            now = replace(self, secret=first, others=tuple(others))
        except ConfigError as error:
            log.warning("join_secret_not_read", error=str(error), hint=error.hint)
            return self
        return now.listening_with(self.secret) if self.secret in now.secrets else now


def read_secrets(file: Path) -> tuple[bytes, ...]:
    """The join secrets in a file, one per line, beside comments. ConfigError: it cannot be read, or has none."""
    secrets = lines_of(text_of("--join-secret-file", file))
    if not secrets:
        raise ConfigError(f"--join-secret-file {file} is empty", hint="copy the one of `elastic serve` there")
    return secrets


def lines_of(text: str) -> tuple[bytes, ...]:
    """The secrets in a text, each once, in order. A line that begins with # is a comment."""
    stripped = (line.strip() for line in text.splitlines())
    return tuple(dict.fromkeys(line.encode() for line in stripped if line and not line.startswith("#")))


def is_loopback(address: str) -> bool:
    """Whether only processes of the same host get there."""
    return address.startswith("127.") or address == "::1"


def is_ipv6(address: str) -> bool:
    """Whether it is an IPv6 address, with brackets or without; a name is none."""
    return ":" in address


def bracketed(address: str) -> str:
    """As it stands before a port."""
    return f"[{address}]" if is_ipv6(address) else address


def bare(address: str) -> str:
    """Without brackets, as sockets take it."""
    return address[1:-1] if address.startswith("[") and address.endswith("]") else address


def ports_of(text: str) -> Ports:
    """The range that FIRST-LAST, or one port, means; nothing: any. ConfigError if it is none."""
    if not text:
        return ANY_PORT
    first, _, last = text.partition("-")
    if first.isdecimal() and (last or first).isdecimal() and 0 < int(first) <= int(last or first) <= LAST_PORT:
        return Ports(int(first), int(last or first))
    raise ConfigError(f"--port-range {text}: it is no range of ports", hint="give FIRST-LAST, such as 7000-7099")
